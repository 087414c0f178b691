"""Represent every source as one table of images with leaf labels, ready to be divided into sites.

Pixels are not in it: images are read one by one, when they are checked and when they are written.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.decoding import check_pixels, describe, open_image, to_rgb
from common.errors import BadRow
from common.hierarchy import Hierarchy

KEPT_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Files of these kinds are copied byte by byte, if they are what their name says."""

TEST_WORDS = frozenset({"test", "testing"})
TRAIN_WORDS = frozenset({"train", "training", "trainval", "val", "valid", "validation"})
"""What a split column may say, in any case; validation images are trained on."""


class SourceImages(Protocol):
    """Give access to images by number."""

    def name(self, index: int) -> str:
        """Return the name of image ``index`` in a message to the local user."""

    def read(self, index: int) -> Image.Image:
        """Decode image ``index`` as 8-bit RGB.

        Any exception means that it is unusable.
        """

    def write(self, index: int, stem: Path) -> str:
        """Write image ``index`` to ``stem`` plus a suffix, and return the suffix."""

    def size(self, index: int) -> int:
        """Return about how many bytes ``write`` needs for image ``index``."""


@dataclass(frozen=True)
class FileImages:
    """Read images that are files already.

    PNG and JPEG are copied as they are, others become PNG.
    """

    paths: Sequence[Path]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> Image.Image:
        return to_rgb(open_image(self.paths[index]))

    def write(self, index: int, stem: Path) -> str:
        path = self.paths[index]
        suffix = path.suffix.lower()
        if suffix in KEPT_SUFFIXES:
            # The content only: times of the original would tell when an image was taken.
            shutil.copyfile(path, stem.with_suffix(suffix))
            return suffix
        return save_png(self.read(index), stem)

    def size(self, index: int) -> int:
        return self.paths[index].stat().st_size


@dataclass(frozen=True)
class ArrayImages:
    """Read images that come as arrays.

    Attributes:
        get: index to uint8 array of shape (H, W) or (H, W, 3).
    """

    get: Callable[[int], NDArray[np.uint8]]

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Image.Image:
        pixels = self.get(index)
        check_pixels(*pixels.shape[:2])
        return to_rgb(Image.fromarray(pixels))

    def write(self, index: int, stem: Path) -> str:
        return save_png(Image.fromarray(self.get(index)), stem)

    def size(self, index: int) -> int:
        return self.get(index).nbytes


@dataclass(frozen=True)
class SourceTable:
    """Hold images, labels and the columns by which they can be grouped.

    Attributes:
        file: the name of the table they come from; bad rows carry it.
        images: the images, numbered like the rows.
        labels: shape (N,) int64, leaf indices.
        hierarchy: the label tree.
        lines: per image its line in ``file`` (None where it has none).
        columns: further columns, each with N cells.
        split_column: the column with the official split, if there is one.
        group_column: the column with the patient (or lesion), if the format defines one.
        bad: rows that were found unusable while reading; they are not among the N.
        notes: what the user should know of how it was read.
    """

    file: str
    images: SourceImages
    labels: NDArray[np.int64]
    hierarchy: Hierarchy
    lines: Sequence[int | None]
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    split_column: str | None = None
    group_column: str | None = None
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def save_png(image: Image.Image, stem: Path) -> str:
    """Write an image as PNG, and return its suffix."""
    # Lightly compressed: speed matters more here than a tenth of the size.
    image.save(stem.with_suffix(".png"), compress_level=1)
    return ".png"


def image_fault(images: SourceImages, index: int) -> str:
    """Decode one image, and describe what is wrong with it or return an empty text."""
    try:
        images.read(index)
    except Exception as error:  # damaged files make decoders raise nearly anything
        return f"{images.name(index)} cannot be decoded ({describe(error)})"
    return ""


def thumbnail(images: SourceImages, index: int) -> NDArray[np.float64]:
    """Return the colours of an image on an 8 by 8 grid, shape (192,)."""
    small = images.read(index).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel()
