"""Read DICOM folders with a label table.

Needs the extra ``fedbags[dicom]``. Pixels are brought to 8 bits as a viewer would show them; the patient's id
groups images and is written nowhere. No other tag is kept: the site folder gets plain PNG files.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.images import check_pixels, stretch
from common.errors import BadRow, UserError
from deploy.datasets.files import FileImages, PathImages, SourceImages, SourceTable, save_png
from deploy.datasets.options import SourceOptions
from deploy.datasets.table import table_source

if TYPE_CHECKING:  # pydicom is an extra
    from pydicom import Dataset

_PATIENT_COLUMN = "dicom-patient"
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})
"""Endings that nothing else has, lower case."""


class DicomImages(PathImages):
    """Read single-frame DICOM files."""

    def read(self, index: int) -> Image.Image:
        """Decode an image as 8-bit RGB."""
        return Image.fromarray(to_8_bits(self.paths[index])).convert("RGB")

    def write(self, index: int, stem: Path) -> str:
        """Write an image to ``stem`` plus a suffix, and return the suffix."""
        return save_png(self.read(index), stem)


class MixedImages(PathImages):
    """Read DICOM and other image files, told apart by their endings."""

    def __post_init__(self) -> None:
        if any(map(_has_dicom_ending, self.paths)):
            _require_pydicom()

    def _one(self, index: int) -> SourceImages:
        path = self.paths[index]
        return DicomImages([path]) if _has_dicom_ending(path) else FileImages([path])

    def read(self, index: int) -> Image.Image:
        """Decode an image as 8-bit RGB."""
        return self._one(index).read(0)

    def write(self, index: int, stem: Path) -> str:
        """Write an image to ``stem`` plus a suffix, and return the suffix."""
        return self._one(index).write(0, stem)


def _require_pydicom() -> None:
    """Refuse DICOM files if the extra that reads them is not installed.

    Raises:
        UserError: pydicom is missing.
    """
    if find_spec("pydicom") is None:
        raise UserError("DICOM needs pydicom: pip install 'fedbags[dicom]'")


def dicom_source(options: SourceOptions) -> SourceTable:
    """Read a label table whose images are DICOM files.

    Groups are the files' PatientID; files without one are bad rows, since nobody could tell whose they
    are.

    Raises:
        UserError: pydicom is not installed; and see table_source.
        DataError: see table_source.
    """
    _require_pydicom()
    table = table_source(options, DicomImages, is_dicom_name)
    assert isinstance(table.images, DicomImages)
    bad = list(table.bad)
    kept, patients = [], []
    written = 0
    for index, path in enumerate(table.images.paths):
        patient, burned, reason = _describe(path)
        written += burned and not reason
        if reason:
            bad.append(BadRow(table.file, table.lines[index], f"{path}: {reason}"))
        else:
            kept.append(index)
            patients.append(patient)
    notes = list(table.notes)
    if written:
        notes.append(
            f"{written} file(s) say that text is burned into their pixels (BurnedInAnnotation): names may be "
            "readable in the images, and the model learns them."
        )
    columns = {name: [cells[index] for index in kept] for name, cells in table.columns.items()}
    return replace(
        table,
        images=DicomImages([table.images.paths[index] for index in kept]),
        labels=table.labels[kept],
        lines=[table.lines[index] for index in kept],
        columns={**columns, _PATIENT_COLUMN: patients},
        group_column=_PATIENT_COLUMN,
        bad=tuple(bad),
        notes=tuple(notes),
    )


def to_8_bits(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of one file, shape (H, W) or (H, W, 3), as a viewer shows them.

    Grey: rescale, then the file's window or look-up table; without either the robust range of the values,
    padding left out. Inverted for MONOCHROME1 and for the presentation shape INVERSE. Colour: as RGB.

    Raises:
        ValueError: several frames, too many pixels, a compression without decoder, or no picture.
    """
    from pydicom.pixels.utils import pixel_array

    data = _read(path)
    if int(data.get("NumberOfFrames", 1) or 1) != 1:
        raise ValueError("several frames in one file")
    # Before any pixel is decoded: the header alone can declare more than the memory holds.
    check_pixels(int(data.Columns), int(data.Rows))
    _require_decoder(data)
    kind = str(data.PhotometricInterpretation)
    pixels = pixel_array(data)
    if kind in ("MONOCHROME1", "MONOCHROME2"):
        return _grey(pixels, data, kind)
    if kind == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        if "RedPaletteColorLookupTableData" not in data:
            raise ValueError("PALETTE COLOR without its palette")
        pixels = apply_color_lut(pixels, data)
        largest = np.iinfo(pixels.dtype).max
    elif kind.startswith(("RGB", "YBR")):
        largest = 2 ** int(data.BitsStored) - 1
    else:
        raise ValueError(f"photometric interpretation {kind} with {pixels.dtype} pixels")
    if largest == 255:
        return np.asarray(pixels[..., :3], dtype=np.uint8)
    return np.asarray((pixels[..., :3] * (255.0 / largest)).clip(0, 255).round(), dtype=np.uint8)


def _grey(pixels: NDArray[Any], data: "Dataset", kind: str) -> NDArray[np.uint8]:
    """Bring grey pixels of shape (H, W) through modality, window and presentation."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    padding = _padding(pixels, data)
    values = np.asarray(apply_modality_lut(pixels, data), dtype=np.float64)
    if data.get("VOILUTSequence"):
        # The table's own width is the range of its values, used or not.
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        grey = apply_voi(values.astype(np.int64), data).astype(np.float64) * (255.0 / (2**bits - 1))
    elif data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
        grey = _windowed(values, data)
    else:
        grey = np.zeros(values.shape)
        if not padding.all():
            grey[~padding] = stretch(values[~padding])
    if kind == "MONOCHROME1" or data.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    grey[padding] = 0
    return np.asarray(grey.clip(0, 255).round(), dtype=np.uint8)


def _windowed(values: NDArray[np.float64], data: "Dataset") -> NDArray[np.float64]:
    """Apply the file's first window to values of shape (H, W), giving whole greys 0 to 255.

    The functions are those of DICOM PS3.3, C.11.2.1.
    """
    centre, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    function = str(data.get("VOILUTFunction", "") or "LINEAR")
    if width < 1 or (function != "LINEAR" and width <= 0):
        raise ValueError(f"a window of width {width:g}")
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))
    elif function == "LINEAR_EXACT":
        share = (values - centre) / width + 0.5
    elif function == "LINEAR":
        share = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    else:
        raise ValueError(f"the window function {function}")
    # Cut off, not rounded, as the reference toolkit DCMTK does.
    return np.asarray(np.floor(share.clip(0, 1) * 255), dtype=np.float64)


def _padding(pixels: NDArray[Any], data: "Dataset") -> NDArray[np.bool_]:
    """Mark the stored values, shape (H, W), that stand for "no picture here"."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return np.zeros(pixels.shape, dtype=np.bool_)
    low, high = sorted((int(first), int(data.get("PixelPaddingRangeLimit", first))))
    return np.asarray((pixels >= low) & (pixels <= high))


def _read(path: Path, **options: Any) -> "Dataset":
    """Read a file with or without preamble and file meta information."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    # Forced, since many archives write files without preamble; what is no DICOM file shows by its tags.
    data = pydicom.dcmread(path, force=True, **options)
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return data


def _require_decoder(data: "Dataset") -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = data.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise ValueError(f"compressed as {syntax.name}, which no decoder here knows") from None
    if not available:
        raise ValueError(
            f"compressed as {syntax.name}: pip install python-gdcm (or pylibjpeg and its plugins) to read it"
        )


def _describe(path: Path) -> tuple[str, bool, str]:
    """Return PatientID, whether text is burned into the pixels, and what is wrong with the file."""
    tags = ["PatientID", "SOPClassUID", "BurnedInAnnotation"]
    try:
        data = _read(path, stop_before_pixels=True, specific_tags=tags)
    except Exception as error:  # damaged files make pydicom raise nearly anything
        return "", False, f"not a DICOM file ({type(error).__name__})"
    if "SOPClassUID" not in data:
        return "", False, "not a DICOM file (it names no SOP class)"
    patient = str(data.get("PatientID", "") or "").strip()
    burned = str(data.get("BurnedInAnnotation", "") or "").strip().upper() == "YES"
    return patient, burned, "" if patient else "the file has no PatientID"


def is_dicom_name(ending: str) -> bool:
    """Return whether DICOM files may have this ending.

    It is an ending of their own, none, or the last number of a UID.
    """
    return ending in DICOM_SUFFIXES or ending in (".img", "") or ending[1:].isdigit()


def _has_dicom_ending(path: Path) -> bool:
    return path.suffix.lower() in DICOM_SUFFIXES
