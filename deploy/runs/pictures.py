"""Find and read the pictures that a user names for ``fedbags predict``.

They may be files, folders and DICOM files, and are read as for training. The module knows no model. Folders
are searched as ``bags build`` searches them, and what is left out is listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from client.data.images import open_image
from common.errors import BadRow, UserError
from deploy.datasets.dicom import DicomImages, is_dicom_name
from deploy.datasets.files import IMAGE_SUFFIXES, find_images
from deploy.simulation.prerequisites import missing_extra

_PREAMBLE, _MAGIC = 128, b"DICM"


@dataclass(frozen=True)
class _Pictures:
    """Hold what was found under the paths that were named.

    Attributes:
        files: each once, in the order of the paths, those of a folder sorted.
        bad: paths under which there is nothing to read.
        notes: what was left out of folders.
    """

    files: tuple[Path, ...]
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...]


def find_pictures(paths: Sequence[Path]) -> _Pictures:
    """Find every picture under the paths.

    Args:
        paths: files of any name, and folders, which are searched at any depth.

    Raises:
        UserError: one is a DICOM file, and the extra for these is not installed.
    """
    files: dict[Path, None] = {}
    bad: list[BadRow] = []
    notes: list[str] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                bad.append(BadRow(str(path), None, "no such file"))
            files.update({path: None} if path.exists() else {})
            continue
        found = find_images(path, lambda ending: ending in IMAGE_SUFFIXES or is_dicom_name(ending))
        # Many other files have no ending: of these only what says that it is DICOM is taken.
        taken = [file for file in found.images if file.suffix or _is_dicom(file)]
        if not taken:
            bad.append(BadRow(str(path), None, "no image in this folder"))
        files.update(dict.fromkeys(taken))
        notes += [f"{path}: {note}" for note in found.notes()]
        if left := len(found.images) - len(taken):
            notes.append(f"{path}: {left} file(s) without ending are no images and were left out.")
    if find_spec("pydicom") is None and any(map(_is_dicom, files)):
        raise UserError(missing_extra("pydicom"))
    return _Pictures(tuple(files), tuple(bad), tuple(notes))


def open_picture(path: Path) -> Image.Image:
    """Read one picture as a site's images are read, or a DICOM file as ``bags build`` reads it.

    Raises:
        ValueError: see client.data.images.open_image and deploy.datasets.dicom.to_8_bits.
        OSError: the file cannot be read.
    """
    return DicomImages([path]).read(0) if _is_dicom(path) else open_image(path)


def _is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its content, or by an ending that only DICOM files have."""
    # The usual images are many and need not be opened for this.
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return False
    try:
        with path.open("rb") as stream:
            start = stream.read(_PREAMBLE + len(_MAGIC))
    except OSError:
        return False
    return start[_PREAMBLE:] == _MAGIC or (path.suffix != "" and is_dicom_name(path.suffix.lower()))
