"""DICOM: pixels as a viewer shows them, patients as groups, nothing of them in the site folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import client.data.images
from client.data.bags import BagStore
from common.errors import UserError
from deploy.datasets import dicom
from deploy.datasets.build import build_sites, open_source
from deploy.datasets.dicom import _PATIENT_COLUMN, to_8_bits
from deploy.datasets.options import Division, SourceOptions

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


def test_colour_pixels_stay_and_what_is_no_picture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_dicom(tmp_path / "colour.dcm", colour)
    assert np.array_equal(to_8_bits(tmp_path / "colour.dcm"), colour)
    write_dicom(tmp_path / "film.dcm", RAMP, NumberOfFrames=2)
    with pytest.raises(ValueError, match="several frames"):
        to_8_bits(tmp_path / "film.dcm")
    write_dicom(tmp_path / "lab.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(ValueError, match="PALETTE COLOR without its palette"):
        to_8_bits(tmp_path / "lab.dcm")
    write_dicom(tmp_path / "lab.dcm", RAMP, PhotometricInterpretation="HSV")
    with pytest.raises(ValueError, match="photometric interpretation HSV"):
        to_8_bits(tmp_path / "lab.dcm")
    monkeypatch.setattr(client.data.images, "_MAX_PIXELS", 200)
    with pytest.raises(ValueError, match="16 x 16 pixels are more than the 200 pixels"):
        to_8_bits(tmp_path / "colour.dcm")


@pytest.mark.parametrize("other", [-1000, 80, 3000])
def test_a_window_shows_a_value_the_same_whatever_lies_beside_it(tmp_path: Path, other: int) -> None:
    stored = np.array([[40, other]], dtype=np.int16) + 1024
    tags = {"RescaleIntercept": "-1024", "RescaleSlope": "1", "WindowCenter": "40", "WindowWidth": "400"}
    write_dicom(tmp_path / "x.dcm", stored.astype(np.uint16), **tags)
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[127, {-1000: 0, 80: 153, 3000: 255}[other]]]


def test_other_window_functions(tmp_path: Path) -> None:
    stored = np.array([[0, 100, 200]], dtype=np.uint16)
    window = {"WindowCenter": ["100", "50"], "WindowWidth": ["200", "10"]}
    write_dicom(tmp_path / "x.dcm", stored, VOILUTFunction="LINEAR_EXACT", **window)
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[0, 127, 255]], "the first of two windows"
    write_dicom(tmp_path / "x.dcm", stored, VOILUTFunction="SIGMOID", **window)
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[30, 127, 224]]
    write_dicom(tmp_path / "x.dcm", stored, VOILUTFunction="CURVED", **window)
    with pytest.raises(ValueError, match="the window function CURVED"):
        to_8_bits(tmp_path / "x.dcm")


def test_a_look_up_table_keeps_its_own_range(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 12])
    table.add_new("LUTData", "US", (np.arange(4096) // 2).tolist())
    write_dicom(tmp_path / "x.dcm", np.array([[0, 2048, 4095]], dtype=np.uint16), VOILUTSequence=[table])
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[0, 64, 127]], "half of the table's range is used"


@pytest.mark.parametrize(
    ("kind", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", None, True),
    ],
)
def test_the_presentation_shape_inverts_once(
    tmp_path: Path, kind: str, shape: str | None, inverted: bool
) -> None:
    tags = {"PresentationLUTShape": shape} if shape else {}
    write_dicom(tmp_path / "x.dcm", RAMP, PhotometricInterpretation=kind, **tags)
    row = to_8_bits(tmp_path / "x.dcm")[0]
    assert (row[0], row[-1]) == ((255, 0) if inverted else (0, 255))


def test_padding_takes_no_part_in_the_range_and_stays_black(tmp_path: Path) -> None:
    padded = RAMP.copy()
    padded[:4] = 4095
    write_dicom(tmp_path / "x.dcm", np.minimum(padded, 4095), PixelPaddingValue=4095)
    shown = to_8_bits(tmp_path / "x.dcm")
    assert (shown[:4] == 0).all()
    assert (shown[8, 0], shown[8, -1]) == (0, 255)
    low = np.where(padded == 4095, 0, RAMP // 8 + 2000).astype(np.uint16)
    write_dicom(tmp_path / "x.dcm", low, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    shown = to_8_bits(tmp_path / "x.dcm")
    assert len(np.unique(shown[8])) == 16
    assert (shown[:4] == 0).all()
    write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), PixelPaddingValue=0)
    assert (to_8_bits(tmp_path / "x.dcm") == 0).all()


def test_palette_and_deep_colour_are_read(tmp_path: Path) -> None:
    palette = {}
    for colour, values in (("Red", [0, 65535]), ("Green", [0, 32768]), ("Blue", [65535, 0])):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = np.array(values, "<u2").tobytes()
    index = np.array([[0, 1]], dtype=np.uint8)
    write_dicom(tmp_path / "x.dcm", index, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[[0, 0, 255], [255, 128, 0]]]
    write_dicom(tmp_path / "x.dcm", np.array([[[0, 2048, 4095]]], dtype=np.uint16))
    assert to_8_bits(tmp_path / "x.dcm").tolist() == [[[0, 128, 255]]]


def test_files_called_by_uid_and_files_without_preamble_are_read(tmp_path: Path) -> None:
    rows = ["image,diagnosis_1"]
    names = ["1.2.840.1", "1.2.840.1.5", "1.2.840.1.5.7", "a.IMA", "b.dic", "c.DCM", "plain", "d.img"]
    for number, name in enumerate(names):
        write_dicom(tmp_path / "in" / name, RAMP + np.uint16(number), f"CANARY^{number}")
        rows.append(f"{name},{'ab'[number % 2]}")
    expected = to_8_bits(tmp_path / "in/plain")
    whole = pydicom.dcmread(tmp_path / "in/plain")
    bare = pydicom.Dataset(whole)
    bare.save_as(tmp_path / "in/plain", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "in/plain").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(to_8_bits(tmp_path / "in/plain"), expected)
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    table = open_source(SourceOptions("dicom", images=tmp_path / "in", labels=tmp_path / "labels.csv"))
    assert table.bad == ()
    assert [path.name for path in table.images.paths] == names  # type: ignore[attr-defined]


def test_a_compression_without_decoder_names_the_package(tmp_path: Path) -> None:
    from pydicom.uid import JPEGLSLossless

    write_dicom(tmp_path / "x.dcm", RAMP)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    data.file_meta.TransferSyntaxUID = JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    data["PixelData"].VR = "OB"
    data.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match=r"compressed as JPEG-LS .*pip install python-gdcm"):
        to_8_bits(tmp_path / "x.dcm")


def test_burned_in_writing_is_noted(folder: Path) -> None:
    write_dicom(folder / "in/scan0", RAMP, BurnedInAnnotation="YES")
    table = open_source(SourceOptions("dicom", images=folder / "in", labels=folder / "labels.csv"))
    report = build_sites(table, folder / "out", Division(sites=1, bag_size=4))
    assert any("1 file(s) say that text is burned into their pixels" in note for note in report.notes)


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
    table = open_source(SourceOptions("dicom", images=folder / "in", labels=folder / "labels.csv"))
    assert table.group_column == _PATIENT_COLUMN
    assert table.columns[_PATIENT_COLUMN][:4] == ["CANARY^0"] * 3 + ["CANARY^1"]
    report = build_sites(table, folder / "out", Division(sites=1, bag_size=4))
    assert report.max_bags_per_group == 1
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or b"CANARY" not in path.read_bytes()
    assert BagStore.open(folder / "out/site-1", 16).summary.used == 12


def test_bad_dicom_files_are_bad_rows(folder: Path) -> None:
    write_dicom(folder / "in/scan0", RAMP, patient="")
    (folder / "in/scan1.dcm").write_bytes(b"not DICOM")
    whole = (folder / "in/scan2").read_bytes()
    (folder / "in/scan2").write_bytes(whole[:-100])
    table = open_source(SourceOptions("dicom", images=folder / "in", labels=folder / "labels.csv"))
    reasons = [str(row) for row in table.bad]
    assert "row 2" in reasons[0]
    assert "has no PatientID" in reasons[0]
    assert "row 3" in reasons[1]
    assert "not a DICOM file" in reasons[1]
    report = build_sites(table, folder / "out", Division(sites=1, bag_size=4), skip_bad=True)
    assert (report.used, report.quarantined) == (9, 3)


def test_without_pydicom_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedbags\[dicom\]'"):
        open_source(SourceOptions("dicom", images=folder / "in", labels=folder / "labels.csv"))


def test_importing_the_module_does_not_import_pydicom() -> None:
    code = "import sys, deploy.datasets.dicom; print('pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
