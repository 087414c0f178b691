"""Archives are bounded by what they declare, before anything of them is unpacked."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import deploy.datasets.archive
from common.errors import UserError
from deploy.datasets.archive import _check_arrays
from deploy.datasets.build import open_source
from deploy.datasets.options import SourceOptions


def npy(shape: tuple[int, ...], data: bytes = b"", descr: str = "|u1") -> bytes:
    """An array file that declares a shape, whatever is behind it."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def write(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return path


def refuse(kind: str, path: Path) -> str:
    """The message of a refusal that took no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read as") as caught:
            open_source(SourceOptions(kind, images=path))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    return str(caught.value)


KINDS = [("archive", "x"), ("medmnist", "train_images")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("shape", [(10**15,), (10**6, 10**6, 10**6), (2**40, 4, 4), (3, 3), (2,)])
def test_a_shape_that_is_not_behind_the_header_is_refused(
    tmp_path: Path, kind: str, name: str, shape: tuple[int, ...]
) -> None:
    path = write(tmp_path / "x.npz", **{name: npy(shape, b"12345"), "train_labels": npy((5,), b"12345")})
    text = refuse(kind, path)
    assert f"{name}.npy declares uint8 of shape" in text
    assert "holds 5 bytes" in text


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_bomb_is_refused_by_what_the_zip_declares(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / "x.npz", **{name: npy((9,), b"123456789"), "train_labels": npy((1,), b"1")})
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    # The uncompressed size in the directory: 2 GB short of what 32 bits hold, in every member.
    while at >= 0:
        content[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2**31)
        at = content.find(b"PK\x01\x02", at + 4)
    path.write_bytes(bytes(content))
    with (
        zipfile.ZipFile(path) as packed,
        pytest.raises(ValueError, match="it takes 4,294,967,296 bytes unpacked"),
    ):
        _check_arrays(packed, room=2**30)
    assert "declares uint8" in refuse(kind, path), "where there is room, the header does not fit"


def test_a_real_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", x=npy((2**26,), bytes(2**26)))
    assert path.stat().st_size < 2**17
    with zipfile.ZipFile(path) as packed, pytest.raises(ValueError, match="room for 1,000"):
        _check_arrays(packed, room=1000)


def test_a_stream_longer_than_declared_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", x=npy((100,), bytes(100)))
    content = path.read_bytes()
    declared, size = struct.pack("<I", len(npy((100,))) + 100), struct.pack("<I", len(npy((100,))) + 50)
    assert content.count(declared) == 2
    path.write_bytes(content.replace(declared, size))
    assert "Bad CRC-32 for file 'x.npy'" in refuse("archive", path)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_damaged_archives_are_named(tmp_path: Path, kind: str, name: str, cut: float) -> None:
    noise = np.random.default_rng(0).bytes(4000)
    path = write(tmp_path / "x.npz", **{name: npy((4000,), noise), "train_labels": npy((1,), b"1")})
    content = bytearray(path.read_bytes())
    at = int(len(content) * cut)
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    refuse(kind, path)


def test_too_many_members_objects_and_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))
    assert "x.npy holds Python objects" in refuse("archive", tmp_path / "o.npz")
    third = bytearray(npy((1,), b"1"))
    third[6] = 3
    assert "version (3, 0)" in refuse("archive", write(tmp_path / "v.npz", x=bytes(third)))
    monkeypatch.setattr(deploy.datasets.archive, "_MAX_MEMBERS", 3)
    many = write(tmp_path / "m.npz", **{f"x{number}": npy((1,), b"1") for number in range(4)})
    assert "4 members, more than the 3" in refuse("archive", many)
