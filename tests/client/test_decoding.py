"""The one decoder: what a viewer shows, or a refusal with the same words in build, check and predict."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import client.data.images
from client.data.images import (
    _MAX_PIXELS,
    decode_all,
    describe_fault,
    open_image,
    stretch,
    to_rgb,
)
from common.errors import DataError
from common.hierarchy import Hierarchy
from deploy.datasets.build import build_sites
from deploy.datasets.files import IMAGE_SUFFIXES, FileImages, SourceTable, image_fault
from deploy.datasets.options import Division

UPRIGHT = np.zeros((8, 12, 3), dtype=np.uint8)
UPRIGHT[:, :6] = (255, 0, 0)
UPRIGHT[:4, 6:] = (0, 255, 0)
"""Left half red, upper right green: no two of the eight orientations are alike."""

STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(UPRIGHT, -1),
}
"""What lies in the file, by the EXIF orientation that brings it upright."""


def decoded(path: Path, size: int = 8) -> np.ndarray:
    (result,) = decode_all([path], size)
    assert not result.fault, result.fault
    return result.pixels


def fault(path: Path) -> str:
    (result,) = decode_all([path], 8)
    assert result.fault
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the words are compared below)
        open_image(path)
    assert describe_fault(caught.value) in result.fault
    assert describe_fault(caught.value) in image_fault(FileImages([path]), 0)
    return result.fault


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, **options)
    shown = np.asarray(to_rgb(open_image(path)))
    assert shown.shape == UPRIGHT.shape
    assert np.abs(shown.astype(int) - UPRIGHT).max() < 60
    assert np.abs(decoded(path).astype(int) - UPRIGHT[:, 2:10]).max() < 60
    suffix = FileImages([path]).write(0, tmp_path / "written")
    again = np.asarray(to_rgb(open_image(tmp_path / f"written{suffix}")))
    assert np.array_equal(again, shown), "what a site folder holds is turned once"


def test_damaged_exif_does_not_spoil_the_picture(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), UPRIGHT)


def test_images_without_exif_are_as_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(decoded(tmp_path / "x.png"), pixels)


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_several_pages_or_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    pages[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=pages[1:])
    assert "3 pages or frames in one file" in fault(tmp_path / f"x{suffix}")


def test_a_page_with_a_smaller_copy_and_a_camera_preview_are_one_picture(tmp_path: Path) -> None:
    page, small = Image.fromarray(UPRIGHT), Image.new("RGB", (4, 4))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(tmp_path / "x.tif", save_all=True, append_images=[small])
    with Image.open(tmp_path / "x.tif") as image:
        assert getattr(image, "n_frames", 1) == 2
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.tif")), UPRIGHT)
    page.save(tmp_path / "x.mpo", save_all=True, append_images=[small])
    (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg").size == (12, 8)


def write_png_header(path: Path, width: int, height: int) -> None:
    """A PNG that says its size and has no pixel."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )  # fmt: skip


@pytest.mark.parametrize("width", [9_500, 95_000, 2**31 - 1])
def test_one_pixel_limit_and_one_message_for_build_check_and_predict(tmp_path: Path, width: int) -> None:
    write_png_header(tmp_path / "x.png", width, 10_000)
    assert f"more than the {_MAX_PIXELS:,} pixels that one image may have" in fault(tmp_path / "x.png")
    source = SourceTable(
        "table.csv", FileImages([tmp_path / "x.png"]), np.zeros(1, np.int64),
        Hierarchy.from_rows(["leaf"], [["a"]]), [2],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"table.csv, row 2: .*more than the 89,478,485 pixels"):
        build_sites(source, tmp_path / "out", Division(sites=1))


def test_the_limit_itself_is_read() -> None:
    client.data.images.check_pixels(_MAX_PIXELS, 1)
    with pytest.raises(ValueError, match="pixels are more"):
        client.data.images.check_pixels(_MAX_PIXELS + 1, 1)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_ending_that_is_taken_for_an_image_is_read(tmp_path: Path, suffix: str) -> None:
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    known = {".jpe": "JPEG", ".jfif": "JPEG", ".j2k": "JPEG2000", ".dib": "DIB"}
    Image.new(mode, (16, 16), 1).save(tmp_path / f"x{suffix}", known.get(suffix))
    assert decoded(tmp_path / f"x{suffix}").shape == (8, 8, 3)


def test_what_is_no_photograph_is_refused_before_a_program_is_started(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "not an image file of a known format" in fault(tmp_path / "x.png")


def test_a_hot_pixel_does_not_take_the_range_of_a_deep_image(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 16, (64, 1))
    ramp[10, 10] = 65535
    Image.fromarray(ramp).save(tmp_path / "x.png")
    shown = np.asarray(to_rgb(open_image(tmp_path / "x.png")))[..., 0]
    assert len(np.unique(shown)) >= 64
    assert (shown.min(), shown.max()) == (0, 255)


def test_a_deep_image_of_few_bright_points_keeps_them() -> None:
    dots = np.zeros((64, 64))
    dots[5, 5], dots[6, 6] = 100, 200
    shown = stretch(dots)
    assert (shown[5, 5], shown[6, 6], shown[0, 0]) == (127, 255, 0)
    assert (stretch(np.full((4, 4), 7.0)) == 0).all()
    with pytest.raises(ValueError, match="no numbers"):
        stretch(np.array([[0.0, np.nan]]))


def test_deep_colour_of_few_bits_is_refused_and_of_all_bits_read(tmp_path: Path) -> None:
    def write(path: Path, values: np.ndarray) -> None:
        """A 16-bit RGB PNG, which Pillow does not write."""
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        parts = [
            b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0),
            b"IDAT" + zlib.compress(rows),
            b"IEND",
        ]
        chunks = (
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
        )
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3))
    write(tmp_path / "x.png", values)
    assert "16-bit colour that uses 12 bits or fewer" in fault(tmp_path / "x.png")
    write(tmp_path / "x.png", values * 16)
    assert np.array_equal(decoded(tmp_path / "x.png"), values * 16 >> 8)
