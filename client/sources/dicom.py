"""DICOM folders with a label table. Needs the extra ``fedbags[dicom]``.

Pixels are brought to 8 bits as a viewer would show them; the patient's id groups images and is written
nowhere. No other tag is kept: the site folder gets plain PNG files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.sources.source_table import SourceTable, save_png
from client.sources.table import table_source
from common.errors import BadRow, UserError

PATIENT_COLUMN = "dicom-patient"


@dataclass(frozen=True)
class DicomImages:
    """Single-frame DICOM files."""

    paths: Sequence[Path]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(to_8_bits(self.paths[index])).convert("RGB")

    def write(self, index: int, stem: Path) -> str:
        return save_png(self.read(index), stem)

    def size(self, index: int) -> int:
        return self.paths[index].stat().st_size


def dicom_source(
    folder: Path, labels: Path, hierarchy: Path | None = None, label_column: str | None = None
) -> SourceTable:
    """Read a label table whose images are DICOM files; see ``table_source`` for its columns.

    Groups are the files' PatientID; files without one are bad rows, since nobody could tell whose they
    are.

    Raises:
        UserError: pydicom is not installed; and see table_source.
        DataError: see table_source.
    """
    if find_spec("pydicom") is None:
        raise UserError("DICOM needs pydicom: pip install 'fedbags[dicom]'")
    table = table_source(
        folder, labels, hierarchy, label_column, reader=DicomImages, suffixes={".dcm", ".dicom", ""}
    )
    assert isinstance(table.images, DicomImages)
    bad = list(table.bad)
    kept, patients = [], []
    for index, path in enumerate(table.images.paths):
        patient, reason = _patient(path)
        if reason:
            bad.append(BadRow(table.file, table.lines[index], f"{path}: {reason}"))
        else:
            kept.append(index)
            patients.append(patient)
    columns = {name: [cells[index] for index in kept] for name, cells in table.columns.items()}
    return replace(
        table,
        images=DicomImages([table.images.paths[index] for index in kept]),
        labels=table.labels[kept],
        lines=[table.lines[index] for index in kept],
        columns={**columns, PATIENT_COLUMN: patients},
        group_column=PATIENT_COLUMN,
        bad=tuple(bad),
    )


def to_8_bits(path: Path) -> NDArray[np.uint8]:
    """Pixels of one file, shape (H, W) or (H, W, 3), as a viewer shows them.

    Grey: rescale and window of the file (or its look-up table), the result stretched over its own range,
    inverted for MONOCHROME1. Colour: as RGB.

    Raises:
        ValueError: several frames, or a photometric interpretation that is neither.
    """
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    data = pydicom.dcmread(path)
    if int(data.get("NumberOfFrames", 1) or 1) != 1:
        raise ValueError("several frames in one file")
    kind = str(data.PhotometricInterpretation)
    pixels = pixel_array(data)
    if kind.startswith(("RGB", "YBR")) and pixels.dtype == np.uint8:
        return np.asarray(pixels, dtype=np.uint8)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"photometric interpretation {kind} with {pixels.dtype} pixels")
    shown = np.asarray(apply_voi_lut(apply_modality_lut(pixels, data), data), dtype=np.float64)
    low, high = float(shown.min()), float(shown.max())
    grey = (shown - low) * (255.0 / (high - low) if high > low else 0.0)
    return (255 - grey if kind == "MONOCHROME1" else grey).round().astype(np.uint8)


def _patient(path: Path) -> tuple[str, str]:
    """PatientID of a file, and what is wrong with it."""
    import pydicom

    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
    except Exception as error:  # damaged files make pydicom raise nearly anything
        return "", f"not a DICOM file ({type(error).__name__})"
    patient = str(data.get("PatientID", "") or "").strip()
    return patient, "" if patient else "the file has no PatientID"
