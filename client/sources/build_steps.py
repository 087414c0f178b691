"""Check images, count progress, and write all or nothing, as every build of site folders does."""

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
    """Count the work done, for the progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, number: int = 1) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


def image_faults(images: SourceImages, number: int, step: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Decode images 0 to ``number - 1`` once, and yield index and fault of every unusable one."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Pillow only warns of an image of 90 to 180 million pixels; here it is a bad image.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, number, CHUNK):
            chunk = range(start, min(start + CHUNK, number))
            faults = pool.map(lambda index: image_fault(images, index), chunk)
            yield from ((index, fault) for index, fault in zip(chunk, faults, strict=True) if fault)
            step(len(chunk))


def refuse_existing(target: Path, option: str) -> None:
    """Refuse a ``target`` that exists already, naming the option that chose it.

    Raises:
        UserError: there is something at ``target``.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; remove it or choose another {option}")


@contextmanager
def whole_or_nothing(target: Path, needed: Callable[[], int]) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` only when the block ends without a fault.

    Args:
        target: the folder to make; its parents are made.
        needed: bytes that a complete ``target`` takes, for the message about a full disk.

    Raises:
        UserError: the disk is full or refuses.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is one step only within a file system; and hidden, so that
        # nothing takes it for a site.
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
