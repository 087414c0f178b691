"""A site's secret is drawn once, stays readable by its owner alone, and gives the same bytes for ever."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.site import _SECRET_FILE, derive
from common.errors import UserError


def test_the_same_bytes_again_and_others_for_another_site_purpose_or_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first = derive(one, "seed", b"round 1")
    assert derive(one, "seed", b"round 1") == first
    others = {
        derive(two, "seed", b"round 1"),
        derive(one, "split", b"round 1"),
        derive(one, "seed", b"round 2"),
    }
    assert len(others | {first}) == 4
    assert {len(value) for value in others} == {32}


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    derive(tmp_path, "seed", b"")
    assert stat.S_IMODE((tmp_path / _SECRET_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [_SECRET_FILE]


def test_processes_that_start_at_once_get_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: derive(tmp_path, "seed", b""), range(32)))) == 1


def test_a_damaged_secret_is_named(tmp_path: Path) -> None:
    (tmp_path / _SECRET_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match=r"site\.secret is damaged: 5 bytes"):
        derive(tmp_path, "seed", b"")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read or made"):
        derive(tmp_path / "missing", "seed", b"")
