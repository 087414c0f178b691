"""List the image files below a folder, and find them by the names that tables give them.

Folders that programs put next to pictures are skipped by name, files that are no image by their ending, and
both are counted, so that the user is informed of them.
"""

import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath

from common.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jp2",
        ".j2k",
        ".tif",
        ".tiff",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
    }
    | {".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif"}
)
"""Endings of the formats that ``client.image_cache`` decodes, lower case."""

SYSTEM_NAMES = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini"})
"""Lower case: what file servers and archive programs put beside pictures; so does every name with a dot."""

NAMES_SHOWN = 3

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
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _listed(counted: Counter[str]) -> str:
    shown = [f"{name} ({number})" for name, number in counted.most_common(NAMES_SHOWN)]
    more = len(counted) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
