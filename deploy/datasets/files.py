"""Find the image files below a folder, and represent every source as one table of images with leaf labels.

Folders that programs put next to pictures are skipped by name, files that are no image by their ending, and
both are counted, so that the user is informed of them. Pixels are not in the table: images are read one by
one, when they are checked and when they are written.
"""

import bisect
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.images import check_pixels, describe_fault, open_image, to_rgb
from common.errors import BadRow, UserError
from common.hierarchy import Hierarchy

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib"}
) | frozenset({".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif"})
"""Endings of the formats that ``client.data.images`` decodes, lower case."""

_SYSTEM_NAMES = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini"})
"""Lower case: what file servers and archive programs put beside pictures; so does every name with a dot."""
_KEPT_SUFFIXES = {".png", ".jpg", ".jpeg"}
"""Files of these kinds are copied byte by byte, if they are what their name says."""
TEST_WORDS = frozenset({"test", "testing"})
TRAIN_WORDS = frozenset({"train", "training", "trainval", "val", "valid", "validation"})
"""What a split column may say, in any case; validation images are trained on."""

_NAMES_SHOWN = 3

Ending = Callable[[str], bool]


@dataclass(frozen=True)
class FoundFiles:
    """Hold the image files below a folder, sorted, and counts of its other files.

    Attributes:
        root: the folder.
        images: files with an image's ending.
        hidden: files within hidden and system folders, by the name of what hides them.
        others: further files, by ending.
    """

    root: Path
    images: tuple[Path, ...]
    hidden: Counter[str]
    others: Counter[str]

    def notes(self, *known: str) -> tuple[str, ...]:
        """Describe what was left out, except files with one of the ``known`` endings, such as a table's."""
        others = Counter({ending: number for ending, number in self.others.items() if ending not in known})
        notes = []
        if self.hidden:
            notes.append(f"Hidden and system folders and files were skipped: {_listed(self.hidden)}.")
        if others:
            notes.append(
                f"{sum(others.values())} file(s) below {self.root.name} do not end like an image and were "
                f"left out: {_listed(others)}."
            )
        return tuple(notes)


def find_images(folder: Path, is_image: Ending = IMAGE_SUFFIXES.__contains__) -> FoundFiles:
    """List the image files below a folder.

    Args:
        folder: where to look, at any depth.
        is_image: tells of an ending, lower case with its dot or empty, whether images have it.

    Raises:
        UserError: the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"the image folder is missing: {folder}")
    images = []
    hidden: Counter[str] = Counter()
    others: Counter[str] = Counter()
    # One listing for all names, since a look-up per name would be slow on network disks.
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        hiding = next((part for part in path.relative_to(folder).parts if is_hidden(part)), None)
        if hiding is not None:
            # macOS writes one such file for every file it copies to a foreign disk; they count as one
            # kind.
            hidden["._*" if hiding.startswith("._") else hiding] += 1
        elif is_image(path.suffix.lower()):
            images.append(path)
        else:
            others[path.suffix.lower() or "no ending"] += 1
    return FoundFiles(folder, tuple(images), hidden, others)


class FileIndex:
    """Find the image files below a folder by name.

    Raises:
        UserError: the folder is missing.
    """

    def __init__(self, folder: Path, is_image: Ending = IMAGE_SUFFIXES.__contains__) -> None:
        self.found = find_images(folder, is_image)
        self.twins: set[Path] = set()
        """Images asked for that lie in several folders with the same bytes; the first is given."""
        self._folded: list[tuple[str, str]] | None = None
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.found.images:
            relative = path.relative_to(folder)
            for name in {str(relative), path.name}:
                self._by_name.setdefault(name, []).append(path)
            for name in {str(relative.with_suffix("")), path.stem}:
                self._by_stem.setdefault(name, []).append(path)

    def find(self, name: str) -> tuple[Path, str]:
        """Return the file called ``name``, with or without folder and suffix, and what is wrong with it."""
        if not name:
            return Path(), "the image name is empty"
        parts = PurePath(name if name in self._by_name else name.replace("\\", "/"))
        if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
            return Path(), f"{name!r} leads out of the image folder"
        if parts.parts[:1] == (self.found.root.name,) and not self._has(parts):
            parts = PurePath(*parts.parts[1:])
        # A whole name comes first: of DICOM files called by UID, one's stem may be another's name.
        found = self._by_name.get(str(parts)) or self._by_stem.get(str(parts), [])
        if not found:
            return Path(), f"{name!r}: no such image{self._near(parts)}"
        if len(found) > 1:
            if len({path.read_bytes() for path in found}) > 1:
                return Path(), f"{name!r}: several images of that name"
            self.twins.add(found[0])
        return found[0], ""

    def _has(self, name: PurePath) -> bool:
        return str(name) in self._by_name or str(name) in self._by_stem

    def _near(self, name: PurePath) -> str:
        """Suggest a file whose name differs by case, by ending, or by what follows the name."""
        if self._folded is None:
            self._folded = sorted((path.name.lower(), path.name) for path in self.found.images)
        stem = (name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name).lower()
        at = bisect.bisect_left(self._folded, (stem, ""))
        if stem and at < len(self._folded) and self._folded[at][0].startswith(stem):
            return f"; did you mean {self._folded[at][1]!r}?"
        return ""


def is_hidden(name: str) -> bool:
    """Return whether a folder or file of this name is hidden or put there by a system program."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _listed(counted: Counter[str]) -> str:
    shown = [f"{name} ({number})" for name, number in counted.most_common(_NAMES_SHOWN)]
    more = len(counted) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


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
class PathImages:
    """Name and measure images that are files already; how they are read is their kind's."""

    paths: Sequence[Path]

    def name(self, index: int) -> str:
        """Return the name of an image in a message to the local user."""
        return str(self.paths[index])

    def size(self, index: int) -> int:
        """Return about how many bytes writing an image needs."""
        return self.paths[index].stat().st_size


class FileImages(PathImages):
    """Read image files, of which PNG and JPEG are copied as they are, and others become PNG."""

    def read(self, index: int) -> Image.Image:
        """Decode an image as 8-bit RGB."""
        return to_rgb(open_image(self.paths[index]))

    def write(self, index: int, stem: Path) -> str:
        """Write an image to ``stem`` plus a suffix, and return the suffix."""
        path = self.paths[index]
        suffix = path.suffix.lower()
        if suffix in _KEPT_SUFFIXES:
            # The content only: times of the original would tell when an image was taken.
            shutil.copyfile(path, stem.with_suffix(suffix))
            return suffix
        return save_png(self.read(index), stem)


@dataclass(frozen=True)
class ArrayImages:
    """Read images that come as arrays.

    Attributes:
        get: index to uint8 array of shape (H, W) or (H, W, 3).
    """

    get: Callable[[int], NDArray[np.uint8]]

    def name(self, index: int) -> str:
        """Return the name of an image in a message to the local user."""
        return f"image {index}"

    def read(self, index: int) -> Image.Image:
        """Decode an image as 8-bit RGB."""
        pixels = self.get(index)
        check_pixels(*pixels.shape[:2])
        return to_rgb(Image.fromarray(pixels))

    def write(self, index: int, stem: Path) -> str:
        """Write an image to ``stem`` plus a suffix, and return the suffix."""
        return save_png(Image.fromarray(self.get(index)), stem)

    def size(self, index: int) -> int:
        """Return about how many bytes writing an image needs."""
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
        return f"{images.name(index)} cannot be decoded ({describe_fault(error)})"
    return ""


def thumbnail(images: SourceImages, index: int) -> NDArray[np.float64]:
    """Return the colours of an image on an 8 by 8 grid, shape (192,)."""
    small = images.read(index).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel()
