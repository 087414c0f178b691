"""A file that a process dies over holds the old content or the new one, whole, wherever it dies."""

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site import SiteConfig, SitePolicy, _PrivacyBudget
from common.files import (
    create_bytes,
    locked,
    new_folder,
    newest_json_lines,
    read_json_lines,
    replacing,
    write_text,
)
from common.records import PrivacyStatement
from deploy.consortium.authority import Authority, _Issued
from deploy.consortium.kit import SiteKit
from server import run_folder
from server.run_folder import RunFolder
from server.statements import StatementStore, _Memory


class KilledError(BaseException):
    """The process ends here: nothing that would run after it runs."""


def plain(folder: Path, version: int) -> None:
    write_text(folder / "file", f"version {version}")


def site_with_budget(folder: Path, version: int) -> None:
    policy = SitePolicy(budget=_PrivacyBudget(epsilon=1.0 + version, delta=1e-5))
    SiteConfig(name="north", policy=policy).save(folder)


def app_pin(folder: Path, version: int) -> None:
    kit = SiteKit(consortium="c", app_hash="0" * 64, site="a", server="127.0.0.1", port=8443).at(folder)
    kit.approve(f"app {version}".encode())


def revocations(folder: Path, version: int) -> None:
    day = datetime(2026, 1, 1 + version, tzinfo=UTC)
    issued = _Issued(subject="a", serial="1", public_key="k", not_before=day, not_after=day, revoked=day)
    Authority(folder, None, None)._save([issued])  # type: ignore[arg-type]


def confusion(folder: Path, version: int) -> None:
    counts = [np.full((2, 2), version)]
    RunFolder(folder).write_confusion(counts, counts)


def statement(folder: Path, version: int) -> None:
    event = {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1 + version}
    last = PrivacyStatement(site="north", round=1, epsilon=1.0, delta=1e-5, events=(event,))
    StatementStore(folder, {})._keep(("north", ""), _Memory(last=last))


def server_state(folder: Path, version: int) -> None:
    state = run_folder.ServerState(round=1, seconds=float(version))
    run_folder.save_checkpoint(folder, state, {"w": np.full(3, version, np.float32)}, {}, {})


WRITERS = {
    "file": plain,
    "site.toml": site_with_budget,
    "kit.toml": app_pin,
    "issued.json": revocations,
    "confusion.json": confusion,
    "north.json": statement,
    "round-00001.safetensors": server_state,
}


def dying_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process die in place of the step after so many of those that touch the disk."""
    done = count()

    def stepwise(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            if next(done) >= steps:
                raise KilledError
            return real(*given)

        return step

    patch.setattr(Path, "replace", stepwise(Path.replace))
    patch.setattr(os, "fsync", stepwise(os.fsync))
    patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not clean up


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_dies_between_two_steps_leaves_a_whole_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, file = WRITERS[name], tmp_path / name
    write(tmp_path, 1)
    new = file.read_bytes()
    write(tmp_path, 0)
    old = file.read_bytes()
    assert old != new
    for steps in count():
        with monkeypatch.context() as patch:
            dying_after(steps, patch)
            try:
                write(tmp_path, 1)
            except KilledError:
                alive = False
            else:
                alive = True
        assert file.read_bytes() in (old, new)
        if alive:
            break
        # What was left behind is in nobody's way.
        write(tmp_path, 0)
        assert file.read_bytes() == old
    assert file.read_bytes() == new
    assert steps >= 3  # content, name, folder


@pytest.mark.parametrize("name", WRITERS)
def test_the_content_is_synced_before_the_name_and_the_name_before_the_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink()
        steps.append("folder" if place.is_dir() else "content" if place.stat().st_size else "empty")
        sync(handle)

    def replace(path: Path, target: Path) -> Path:
        steps.append("name")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    WRITERS[name](tmp_path, 0)
    assert steps[-3:] == ["content", "name", "folder"]
    assert "empty" not in steps


def test_two_files_take_their_names_once_both_are_complete(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for version in ("old", "new"):
        with replacing(*paths) as temporary:
            for path in temporary:
                path.write_text(version)
    with pytest.raises(FileNotFoundError), replacing(*paths) as temporary:
        temporary[0].rename(tmp_path / "c")
    (tmp_path / "c").unlink()
    assert [path.read_text() for path in paths] == ["new", "new"]
    assert sorted(tmp_path.iterdir()) == paths


def test_a_file_has_the_mode_that_is_asked_for_or_that_of_any_file(tmp_path: Path) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    write_text(tmp_path / "secret", "x", 0o600)
    write_text(tmp_path / "script", "x", 0o755)
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "any", "x")
    finally:
        os.umask(before)
    assert (mode("secret"), mode("script"), mode("any")) == (0o600, 0o755, 0o640)


def test_what_is_created_never_replaces(tmp_path: Path) -> None:
    create_bytes(tmp_path / "secret", b"first")
    create_bytes(tmp_path / "secret", b"second")
    assert (tmp_path / "secret").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_folder_appears_filled_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").rename(folder / "other")
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "b", 0o700) as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_locked_folder_can_be_locked_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KilledError), locked(tmp_path):
            raise KilledError


def test_lines_are_read_up_to_a_torn_one_wherever_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    assert list(newest_json_lines(path)) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ', encoding="utf-8")
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert list(newest_json_lines(path)) == [{"a": 2}, {"a": 1}]
    # Read from the middle, the line that was cut is left out as well.
    assert list(newest_json_lines(path, 17)) == [{"a": 2}]
    path.write_text('{"a": 1}\nspoilt\n', encoding="utf-8")
    with pytest.raises(ValueError, match="Expecting value"):
        read_json_lines(path)
    assert list(newest_json_lines(path)) == [{"a": 1}]
