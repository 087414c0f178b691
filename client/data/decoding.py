"""Decode image files in the same way for building sites, checking them, training and predicting.

Knows formats and pixels, and neither sites nor caches. What is refused here is refused everywhere, with the
same words; every change here must raise ``client.data.image_cache._FORMAT``.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

_FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "TGA", "AVIF")
"""What is tried, by content. Other formats that Pillow knows are no photographs, and some start programs."""

_MAX_PIXELS = 89_478_485
"""Pixels of one image, about a quarter of a GiB as RGB."""

_ROBUST_SHARE = 0.001
"""Share of a deep image's pixels that may lie outside the range shown, at either end: a hot pixel does."""

_REDUCED_OR_MASK = 0b101
"""Bits of TIFF's NewSubfileType: a page that is a smaller copy, or a mask, of another."""


def open_image(path: Path) -> Image.Image:
    """Read one picture, turned by its EXIF orientation, in the mode of the file.

    Raises:
        ValueError: too many pixels, several pages or frames, or 16-bit colour that would be shown black.
        OSError: not an image of FORMATS, or damaged (damaged files make decoders raise nearly anything).
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
    """Refuse an image size of more than MAX_PIXELS.

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
    leaves out ROBUST_SHARE of the pixels at either end, unless nothing would be left.

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


def describe(error: Exception) -> str:
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
