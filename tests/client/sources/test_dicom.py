"""DICOM: pixels as a viewer shows them, patients as groups, nothing of them in the site folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.bags import BagStore
from client.sources import dicom
from client.sources.build import build_sites
from client.sources.catalogue import open_source
from client.sources.dicom import PATIENT_COLUMN, to_8_bits
from common.errors import UserError

pydicom = pytest.importorskip("pydicom")

RAMP = np.tile(np.arange(0, 4096, 256, dtype=np.uint16), (16, 1))


def write_dicom(path: Path, pixels: np.ndarray, patient: str = "CANARY^1", **tags: object) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID = patient
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 8 if pixels.itemsize == 1 else 12
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = 0
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def test_grey_pixels_are_stretched_windowed_and_inverted(tmp_path: Path) -> None:
    write_dicom(tmp_path / "plain.dcm", RAMP)
    plain = to_8_bits(tmp_path / "plain.dcm")
    assert plain.dtype == np.uint8
    assert (plain[0, 0], plain[0, -1]) == (0, 255)
    assert (np.diff(plain[0].astype(int)) == 17).all()

    write_dicom(tmp_path / "inverted.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(to_8_bits(tmp_path / "inverted.dcm"), 255 - plain)

    write_dicom(tmp_path / "window.dcm", RAMP, WindowCenter="1024", WindowWidth="1024")
    window = to_8_bits(tmp_path / "window.dcm")
    assert (window[0, :3] == 0).all(), "below the window"
    assert (window[0, 6:] == 255).all(), "above the window"

    write_dicom(tmp_path / "flat.dcm", np.full((16, 16), 7, dtype=np.uint16))
    assert (to_8_bits(tmp_path / "flat.dcm") == 0).all()


def test_colour_pixels_stay_and_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_dicom(tmp_path / "colour.dcm", colour)
    assert np.array_equal(to_8_bits(tmp_path / "colour.dcm"), colour)
    write_dicom(tmp_path / "film.dcm", RAMP, NumberOfFrames=2)
    with pytest.raises(ValueError, match="several frames"):
        to_8_bits(tmp_path / "film.dcm")
    write_dicom(tmp_path / "lab.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(ValueError, match="PALETTE COLOR"):
        to_8_bits(tmp_path / "lab.dcm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = ["image,diagnosis_1"]
    for number in range(12):
        suffix = ".dcm" if number % 2 else ""
        pixels = RAMP + np.uint16(number)
        write_dicom(tmp_path / "in" / f"scan{number}{suffix}", pixels, f"CANARY^{number // 3}")
        rows.append(f"scan{number},{'ab'[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_dicom_folder_becomes_a_site_without_patient_ids(folder: Path) -> None:
    table = open_source("dicom", images=folder / "in", labels=folder / "labels.csv")
    assert table.group_column == PATIENT_COLUMN
    assert table.columns[PATIENT_COLUMN][:4] == ["CANARY^0"] * 3 + ["CANARY^1"]
    report = build_sites(table, folder / "out", sites=1, bag_size=4)
    assert report.max_bags_per_group == 1
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or b"CANARY" not in path.read_bytes()
    assert BagStore.open(folder / "out/site-1", 16).summary.used == 12


def test_bad_dicom_files_are_bad_rows(folder: Path) -> None:
    write_dicom(folder / "in/scan0", RAMP, patient="")
    (folder / "in/scan1.dcm").write_bytes(b"not DICOM")
    whole = (folder / "in/scan2").read_bytes()
    (folder / "in/scan2").write_bytes(whole[:-100])
    table = open_source("dicom", images=folder / "in", labels=folder / "labels.csv")
    reasons = [str(row) for row in table.bad]
    assert "row 2" in reasons[0]
    assert "has no PatientID" in reasons[0]
    assert "row 3" in reasons[1]
    assert "not a DICOM file" in reasons[1]
    report = build_sites(table, folder / "out", sites=1, bag_size=4, skip_bad=True)
    assert (report.used, report.quarantined) == (9, 3)


def test_without_pydicom_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedbags\[dicom\]'"):
        open_source("dicom", images=folder / "in", labels=folder / "labels.csv")


def test_importing_the_module_does_not_import_pydicom() -> None:
    code = "import sys, client.sources.dicom; print('pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
