"""What every build of site folders shares: progress, checking images, and writing all or nothing."""

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from client.image_cache import CHUNK, Progress
from client.sources.source_table import SourceImages, image_fault
from common.errors import UserError


class Steps:
    """Counts work done for the progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, number: int = 1) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


def image_faults(images: SourceImages, number: int, step: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Decode images 0 to ``number - 1`` once, and give the index and the fault of every unusable one."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, number, CHUNK):
            chunk = range(start, min(start + CHUNK, number))
            faults = pool.map(lambda index: image_fault(images, index), chunk)
            yield from ((index, fault) for index, fault in zip(chunk, faults, strict=True) if fault)
            step(len(chunk))


def refuse_existing(target: Path, option: str) -> None:
    """Raise a UserError that names the option if there is something at ``target``."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; remove it or choose another {option}")


@contextmanager
def whole_or_nothing(target: Path, needed: Callable[[], int]) -> Iterator[Path]:
    """Give a temporary folder beside ``target``, which becomes it only when the block ends without fault.

    Args:
        target: the folder to make; its parents are made.
        needed: bytes that a whole ``target`` takes, for the message about a full disk.

    Raises:
        UserError: the disk is full or refuses.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {target} needs about {needed():,} bytes. Free some space, or choose "
                "another --out."
            ) from error
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
