"""Decode image files in one way everywhere, and keep decoded images on disk, memory-mapped.

Building sites, checking them, training and predicting decode alike, and what is refused here is refused
everywhere, with the same words; every change of it must raise ``_FORMAT``.

The cache is shared by the bag store and by the labelled test images; it knows neither bags nor labels. A
cache is one folder ``KIND-SIZE-FORMAT.VERSION`` holding ``images.npy`` (N, S, S, 3) uint8 and ``cache.json``.
It is built in a temporary folder and renamed into place, so that a reader never meets half a cache and two
processes that build at once end with one.
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
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError

_FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "TGA", "AVIF")
"""What is tried, by content. Other formats that Pillow knows are no photographs, and some start programs."""

_MAX_PIXELS = 89_478_485
"""Pixels of one image, about a quarter of a GiB as RGB."""

_ROBUST_SHARE = 0.001
"""Share of a deep image's pixels that may lie outside the range shown, at either end: a hot pixel does."""

_REDUCED_OR_MASK = 0b101
"""Bits of TIFF's NewSubfileType: a page that is a smaller copy, or a mask, of another."""

_T = TypeVar("_T")
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


def open_image(path: Path) -> Image.Image:
    """Read one picture, turned by its EXIF orientation, in the mode of the file.

    Raises:
        ValueError: too many pixels, several pages or frames, or 16-bit colour that would be shown black.
        OSError: not an image of ``_FORMATS``, or damaged (damaged files make decoders raise nearly anything).
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # Before any pixel is decoded: a small file can declare an image that fills the memory.
            check_pixels(*image.size)
            if (pages := _pages(image)) > 1:
                raise ValueError(f"{pages} pages or frames in one file; save each as a file of its own")
            deep_colour = image.mode == "RGB" and any(";16" in str(tile[3]) for tile in image.tile)
            image.load()
            if deep_colour and 0 < np.asarray(image).max() < 16:
                raise ValueError(
                    "16-bit colour that uses 12 bits or fewer would be shown black; save it with 8 bits"
                )
            if _orientation(image) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_many("it has")) from None


def check_pixels(width: int, height: int) -> None:
    """Refuse an image size of more than ``_MAX_PIXELS``.

    Raises:
        ValueError: it has more.
    """
    if width * height > _MAX_PIXELS:
        raise ValueError(_too_many(f"{width} x {height} pixels are"))


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Bring an image to shape (size, size, 3) in 8-bit RGB by resizing its shorter side and cropping."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        wide, high = max(size, round(width * scale)), max(size, round(height * scale))
        left, top = (wide - size) // 2, (high - size) // 2
        # Pillow's bilinear filter widens with the reduction: it is antialiased.
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Alpha is dropped, deep greyscale is stretched over its own range.

    Raises:
        ValueError: the values of a floating-point image are not all finite.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(stretch(np.asarray(image, dtype=np.float64)))
    # A palette may hold transparency: Pillow wants such an image converted to RGBA first, and warns
    # otherwise.
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def stretch(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Scale values of unknown range, shape (H, W), to 0..255 by their own robust range.

    Files of 16 bits rarely use all of them (12-bit cameras), so their own range is the only safe one. It
    leaves out ``_ROBUST_SHARE`` of the pixels at either end, unless nothing would be left.

    Raises:
        ValueError: the values are not all finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("some of its values are no numbers")
    low, high = np.quantile(values, [_ROBUST_SHARE, 1 - _ROBUST_SHARE])
    # An image with a few bright pixels on one ground has no range left once both ends are cut.
    if low == high:
        low, high = values.min(), values.max()
    shown = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return np.asarray(shown.clip(0, 255).round(), dtype=np.uint8)


def describe_fault(error: Exception) -> str:
    """Return what went wrong with an image, without the path that some of these messages repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _too_many(what: str) -> str:
    return f"{what} more than the {_MAX_PIXELS:,} pixels that one image may have; reduce it"


def _pages(image: Image.Image) -> int:
    """Count the pictures in a file.

    A camera's previews (MPO) and a TIFF's smaller copies of its page do not count.
    """
    number: int = getattr(image, "n_frames", 1)
    if number == 1 or image.format == "MPO":
        return 1
    if image.format != "TIFF":
        return number
    full = 0
    for page in range(number):
        image.seek(page)
        full += not int(image.tag_v2.get(254, 0)) & _REDUCED_OR_MASK  # type: ignore[attr-defined]
    image.seek(0)
    return full


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8.

    It is 1 (as stored) where EXIF is missing or damaged, which is how viewers treat it too.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF makes Pillow raise nearly anything; the pixels are sound
        return 1
    return value if value in range(2, 9) else 1


@dataclass(frozen=True)
class _CachedImages:
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
        bank: of features, the key of what computes them.
    """

    kind: str
    version: str
    image_size: int
    bank: str = ""

    @property
    def folder_name(self) -> str:
        """Return the name of the cache's own folder."""
        bank = f"-{self.bank[:16]}" if self.bank else ""
        return f"{self.kind}-{self.image_size}{bank}-{_FORMAT}.{self.version[:24]}"


def open_cache(
    folder: Path, key: CacheKey, paths: Sequence[Path], progress: Progress | None = None
) -> _CachedImages:
    """Map the cache of these images, building it first where it does not exist.

    Args:
        folder: where caches live; made if missing.
        key: which of them.
        paths: at least one image file, in the order of the rows wanted.
        progress: called after every CHUNK images while building.

    Raises:
        UserError: the folder cannot be written, or the disk is full; no partial cache is left.
    """
    size = key.image_size

    def fill(temporary: Path) -> None:
        _decode_into(temporary, paths, size, progress)

    return opened(folder, key, len(paths) * size * size * 3, fill, _map)


def opened(
    folder: Path, key: CacheKey, needed: int, fill: Callable[[Path], None], read: Callable[[Path], _T]
) -> _T:
    """Return what ``read`` makes of a cache's folder, after ``fill`` built it where it does not exist.

    Args:
        folder: where caches live; made if missing.
        key: which of them.
        needed: bytes that it takes, for the text of an error.
        fill: writes the files of the cache, and ``cache.json`` among them, into an empty folder.
        read: maps them.

    Raises:
        UserError: the folder cannot be written, or the disk is full; no partial cache is left.
    """
    target = folder / key.folder_name
    for _ in range(_ATTEMPTS):
        if not (target / "cache.json").is_file():
            _build_or_say(folder, target, needed, fill)
            _remove_others(folder, target, key.kind)
        try:
            found = read(target)
        except FileNotFoundError:
            continue  # a process that built another cache removed this one since
        with contextlib.suppress(OSError):  # a cache that cannot be marked as used is only removed earlier
            os.utime(target)
        return found
    raise UserError(
        f"the image cache in {folder} is removed by other runs as soon as it is built: more than {_KEPT} "
        "image sizes are in use at once. Run fewer at a time."
    )


def _map(target: Path) -> _CachedImages:
    record = json.loads((target / "cache.json").read_text(encoding="utf-8"))
    images = np.load(target / "images.npy", mmap_mode="r")
    return _CachedImages(
        images=images,
        failed={int(index): reason for index, reason in record["failed"].items()},
        converted=record["converted"],
        resized=record["resized"],
    )


def _build_or_say(folder: Path, target: Path, needed: int, fill: Callable[[Path], None]) -> None:
    try:
        _build(folder, target, fill)
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


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Convert images of shape (m, S, S, 3), uint8, to float32 of shape (m, 3, S, S) in [-1, 1]."""
    # The copy is what torch may write to: the cache is mapped read-only.
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def _decode(path: Path, size: int, read: Callable[[Path], Image.Image]) -> _Decoded:
    try:
        image = read(path)
        pixels = square(to_rgb(image), size)
        return _Decoded(pixels, image.mode != "RGB", image.size != (size, size))
    except Exception as error:  # damaged files make decoders raise nearly anything
        blank = np.zeros((size, size, 3), dtype=np.uint8)
        return _Decoded(blank, fault=f"the image cannot be decoded ({describe_fault(error)})")


def _decode_into(folder: Path, paths: Sequence[Path], size: int, progress: Progress | None) -> None:
    """Write the decoded images and what was met on the way into a folder."""
    failed: dict[int, str] = {}
    converted = resized = 0
    with (folder / "images.npy").open("wb") as stream:
        write_header(stream, "|u1", (len(paths), size, size, 3))
        for index, decoded in enumerate(decode_all(paths, size, progress)):
            stream.write(decoded.pixels.tobytes())
            converted += decoded.converted
            resized += decoded.resized
            if decoded.fault:
                failed[index] = decoded.fault
    record = {"failed": failed, "converted": converted, "resized": resized}
    (folder / "cache.json").write_text(json.dumps(record), encoding="utf-8")


def write_header(stream: BinaryIO, descr: str, shape: tuple[int, ...]) -> None:
    """Begin a .npy file, whose numbers the caller writes behind it.

    On a full disk plain writes raise, where a write through a memory map kills the process.
    """
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})


def _build(folder: Path, target: Path, fill: Callable[[Path], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    try:
        fill(temporary)
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
