"""Finds image files by the names that label tables give them."""

from collections.abc import Collection
from pathlib import Path, PurePath

from common.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"})


class FileIndex:
    """The image files below a folder, listed once: one look-up per row would be slow on network disks.

    Raises:
        UserError: the folder is missing.
    """

    def __init__(self, folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> None:
        if not folder.is_dir():
            raise UserError(f"the image folder is missing: {folder}")
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in suffixes and path.is_file():
                relative = path.relative_to(folder)
                for name in {str(relative), str(relative.with_suffix("")), path.name, path.stem}:
                    self._by_name.setdefault(name, []).append(path)

    def find(self, name: str) -> tuple[Path, str]:
        """The file called ``name`` (with or without folder and suffix), and what is wrong with it."""
        if not name:
            return Path(), "the image name is empty"
        parts = PurePath(name)
        if parts.is_absolute() or ".." in parts.parts:
            return Path(), f"{name!r} leads out of the image folder"
        found = self._by_name.get(str(parts), [])
        if len(found) != 1:
            return Path(), f"{name!r}: " + ("no such image" if not found else "several images of that name")
        return found[0], ""
