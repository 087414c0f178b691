"""Keep decoded images on disk, memory-mapped, so that each is decoded once per data version.

Shared by the bag store and by the labelled test images; knows neither bags nor labels. A cache is one
folder ``KIND-SIZE-FORMAT.VERSION`` holding ``images.npy`` (N, S, S, 3) uint8 and ``cache.json``. It is built
in a temporary folder and renamed into place, so that a reader never meets half a cache and two processes
that build at once end with one.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.decoding import (
    describe,
    open_image,
    square,
    to_rgb,
)
from common.errors import UserError

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

_FORMAT = 2
"""Raised when decoding changes, so that caches of older releases are not taken for this one's."""

CHUNK = 128
"""Images decoded between two writes; bounds memory and sets how often progress is told."""

_KEPT = 3
"""Caches of one kind and version that are kept: sizes of runs that go on at the same time."""

_ATTEMPTS = 3
"""Times that a cache is built which other processes remove again before it is mapped."""

_STALE_SECONDS = 24 * 3600
"""A temporary folder older than this was left by a process that was killed."""


@dataclass(frozen=True)
class CachedImages:
    """Hold decoded images and the faults and conversions met while decoding.

    Attributes:
        images: shape (N, S, S, 3) uint8, read-only, mapped from disk; a failed image is all zero.
        failed: index to reason, for images that could not be decoded.
        converted: images that were not 8-bit RGB.
        resized: images that were not S by S pixels.
    """

    images: NDArray[np.uint8]
    failed: dict[int, str]
    converted: int
    resized: int


@dataclass(frozen=True)
class _Decoded:
    pixels: NDArray[np.uint8]
    converted: bool = False
    resized: bool = False
    fault: str = ""


@dataclass(frozen=True)
class CacheKey:
    """Identify a cache among those of its folder.

    Attributes:
        kind: what the images are for (``bags`` or ``test``): kinds do not replace one another.
        version: hash of everything the content depends on.
        image_size: S, pixels.
    """

    kind: str
    version: str
    image_size: int

    @property
    def folder_name(self) -> str:
        """Return the name of the cache's own folder."""
        return f"{self.kind}-{self.image_size}-{_FORMAT}.{self.version[:24]}"


def open_cache(
    folder: Path, key: CacheKey, paths: Sequence[Path], progress: Progress | None = None
) -> CachedImages:
    """Map the cache of these images, building it first where it does not exist.

    Args:
        folder: where caches live; made if missing.
        key: which of them.
        paths: at least one image file, in the order of the rows wanted.
        progress: called after every CHUNK images while building.

    Raises:
        UserError: the folder cannot be written, or the disk is full; no partial cache is left.
    """
    target = folder / key.folder_name
    for _ in range(_ATTEMPTS):
        if not (target / "cache.json").is_file():
            _build_or_say(folder, target, paths, key.image_size, progress)
            _remove_others(folder, target, key.kind)
        try:
            return _map(target)
        except FileNotFoundError:
            continue  # a process that built another cache removed this one since
    raise UserError(
        f"the image cache in {folder} is removed by other runs as soon as it is built: more than {_KEPT} "
        "image sizes are in use at once. Run fewer at a time."
    )


def _map(target: Path) -> CachedImages:
    record = json.loads((target / "cache.json").read_text(encoding="utf-8"))
    images = np.load(target / "images.npy", mmap_mode="r")
    with contextlib.suppress(OSError):  # a cache that cannot be marked as used is only removed earlier
        os.utime(target)
    return CachedImages(
        images=images,
        failed={int(index): reason for index, reason in record["failed"].items()},
        converted=record["converted"],
        resized=record["resized"],
    )


def _build_or_say(
    folder: Path, target: Path, paths: Sequence[Path], image_size: int, progress: Progress | None
) -> None:
    needed = len(paths) * image_size * image_size * 3
    try:
        _build(folder, target, paths, image_size, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: the image cache in {folder} needs {needed:,} bytes.\n"
                "Free some space, or point the cache at another disk."
            ) from error
        raise UserError(
            f"the image cache in {folder} cannot be written: {error.strerror or error}.\n"
            f"Allow writing there ({needed:,} bytes), or point the cache at another folder."
        ) from error


def decode_all(
    paths: Sequence[Path],
    image_size: int,
    progress: Progress | None = None,
    read: Callable[[Path], Image.Image] = open_image,
) -> Iterator[_Decoded]:
    """Decode images in order with ``read``, several at a time.

    Threads are enough, since Pillow releases the interpreter lock.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Pillow only warns of an image of 90 to 180 million pixels; for us it is a bad image.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            yield from pool.map(lambda path: _decode(path, image_size, read), chunk)
            if progress is not None:
                progress(start + len(chunk), len(paths))


def _decode(path: Path, size: int, read: Callable[[Path], Image.Image]) -> _Decoded:
    try:
        image = read(path)
        pixels = square(to_rgb(image), size)
        return _Decoded(pixels, image.mode != "RGB", image.size != (size, size))
    except Exception as error:  # damaged files make decoders raise nearly anything
        blank = np.zeros((size, size, 3), dtype=np.uint8)
        return _Decoded(blank, fault=f"the image cannot be decoded ({describe(error)})")


def _build(folder: Path, target: Path, paths: Sequence[Path], size: int, progress: Progress | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    try:
        failed: dict[int, str] = {}
        converted = resized = 0
        with (temporary / "images.npy").open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), size, size, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
            # Plain writes: on a full disk they raise, where a write through a memory map kills us.
            for index, decoded in enumerate(decode_all(paths, size, progress)):
                stream.write(decoded.pixels.tobytes())
                converted += decoded.converted
                resized += decoded.resized
                if decoded.fault:
                    failed[index] = decoded.fault
        record = {"failed": failed, "converted": converted, "resized": resized}
        (temporary / "cache.json").write_text(json.dumps(record), encoding="utf-8")
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "cache.json").is_file():
                raise
            # Another process was first; its cache has the same content.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_others(folder: Path, target: Path, kind: str) -> None:
    """Remove the caches of other versions, and all but the most recently used sizes of this one.

    A server that asks for many sizes must not fill the disk, and runs of different sizes at the same time
    must not take each other's away.
    """
    used: list[tuple[float, Path]] = []
    for other in folder.iterdir():
        if other == target or not other.is_dir():
            continue
        try:
            time_of_use = other.stat().st_mtime
        except FileNotFoundError:
            continue  # another process removes as well
        if other.name.startswith("tmp-"):
            if time_of_use < time.time() - _STALE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        elif other.name.startswith(f"{kind}-") and other.suffix == target.suffix:
            used.append((time_of_use, other))
        elif other.name.startswith(f"{kind}-"):
            _remove(other)
    for _, other in sorted(used, reverse=True)[_KEPT - 1 :]:
        _remove(other)


def _remove(cache: Path) -> None:
    """Remove a cache so that no reader finds half of it."""
    with contextlib.suppress(OSError):  # another process was first, or it stays until the next time
        # Renamed first, since removing a folder file by file would leave half a cache for a moment; and a
        # process that builds the same cache anew finds its name free.
        aside = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache.parent))
        cache.rename(aside)
        shutil.rmtree(aside)
