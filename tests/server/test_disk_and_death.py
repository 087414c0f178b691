"""A server that loses its disk, a checkpoint or its life: one clear error, and the run can go on."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import RunError
from common.files import read_json_lines
from deploy.simulation.local_grid import LocalGrid
from server import app as server_app
from server import run_folder
from server.app import app
from server.run_folder import RunFolder, _append_line

from .conftest import TREE


@pytest.fixture
def unbroken(federation: Any, three: dict[int, str]) -> bytes:
    """The final model of a run without faults; the federation is then pointed at a fresh folder."""
    federation.run(federation.sites(dict(three)), quorum=3)
    weights: bytes = federation.weights()
    federation.folder = federation.folder.with_name("broken")
    return weights


def stop_in_round(federation: Any, three: dict[int, str], number: int) -> None:
    def behave(site: str, kind: str, round: int, *messages: Any) -> Any:
        if (kind, round) == ("train", number):
            raise KeyboardInterrupt
        return messages[-1]

    with pytest.raises(KeyboardInterrupt):
        federation.run(federation.sites(dict(three), behave), quorum=3)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(bytes(content))


def assert_nothing_half_written(folder: Path) -> None:
    left = [p.name for p in folder.rglob("*") if p.name.endswith((".partial", ".tmp"))]
    assert left == []
    for name in ("metrics.jsonl", "log.jsonl"):
        lines = (folder / name).read_bytes().split(b"\n")
        assert lines.pop() == b""
        for line in lines:
            json.loads(line)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(
    federation: Any, three: dict[int, str], unbroken: bytes
) -> None:
    stop_in_round(federation, three, 3)
    spoil(federation.folder / "checkpoints" / "round-00002.safetensors")
    federation.run(federation.sites(three), quorum=3, resume=True)
    (event,) = federation.events("checkpoint-damaged")
    assert (event["file"], event["round"]) == ("round-00002.safetensors", 1)
    assert "digest" in event["reason"]
    assert "round-00002.safetensors is damaged" in (federation.folder / "log.jsonl").read_text()
    assert [event["round"] for event in federation.events("round")] == [1, 2, 3]
    assert federation.weights() == unbroken


def test_two_damaged_checkpoints_are_one_clear_error(federation: Any, three: dict[int, str]) -> None:
    stop_in_round(federation, three, 3)
    for path in (federation.folder / "checkpoints").iterdir():
        spoil(path)
    sites = federation.sites(three)
    with pytest.raises(RunError, match=r"no intact checkpoint among .*round-00002.*\n.*backup"):
        federation.run(sites, quorum=3, resume=True)
    assert sites.asked == []


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def only(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
    """``write``, with a disk that is full for files of this name."""
    return lambda path, *rest, **more: (full if Path(path).name == name else write)(path, *rest, **more)


@pytest.mark.parametrize(
    ("module", "function", "file", "rounds"),
    [
        (run_folder, "save_file", None, 0),
        (run_folder, "_append_line", "metrics.jsonl", 1),
        (server_app, "save_model", None, 3),
        (run_folder, "write_json", "summary.json", 3),
        (run_folder, "write_json", "confusion.json", 3),
    ],
)
def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_space(
    federation: Any,
    three: dict[int, str],
    unbroken: bytes,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    file: str | None,
    rounds: int,
) -> None:
    real = getattr(module, function)
    if function == "_append_line":

        def broken(path: Path, line: str) -> None:
            with run_folder._written(path):
                if path.name == file and '"round", ' in line and '"round": 2' in line:
                    full()
            real(path, line)
    elif function == "save_file":

        def broken(tensors: Any, path: Path, metadata: Any = None) -> None:  # type: ignore[misc]
            Path(path).write_bytes(b"half")
            full()
    elif function == "save_model":

        def broken(directory: Path, *rest: Any) -> None:  # type: ignore[misc]
            with monkeypatch.context() as disk:
                disk.setattr(os, "fsync", full)
                real(directory, *rest)
    else:
        broken = only(str(file), real)
    monkeypatch.setattr(module, function, broken)
    confused = pytest.MonkeyPatch()
    if file == "confusion.json":  # scripted sites hold no labelled images
        empty = [np.zeros((size, size), np.int64) for size in TREE.sizes]
        confused.setattr("server.app._confusion_counts", lambda rounds: ({"n": (empty, empty)}, {"n": 1}))
        confused.setattr("server.app.level_figures", lambda *_: [])
    with pytest.raises(RunError, match="No space left on device") as caught:
        federation.run(federation.sites(dict(three)), quorum=3)
    confused.undo()
    assert str(caught.value).count("--resume") == 1
    assert_nothing_half_written(federation.folder)
    assert not (federation.folder / "summary.json").exists()
    kept = run_folder.newest_checkpoint(federation.folder / "checkpoints")
    assert (kept[0].round if kept else 0) == rounds
    monkeypatch.setattr(module, function, real)
    federation.run(federation.sites(three), quorum=3, resume=True)
    assert federation.weights() == unbroken


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    _append_line(path, "one")
    real = Path.open

    class Nearly:
        """A file on a disk that takes three more bytes."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def __enter__(self) -> "Nearly":
            return self

        def __exit__(self, *_: object) -> None:
            self._stream.close()

        def write(self, data: bytes) -> int:
            return int(self._stream.write(data[:3]))

    monkeypatch.setattr(Path, "open", lambda *a, **k: Nearly(real(*a, **k)))
    with pytest.raises(RunError, match="lines could not be written"):
        _append_line(path, "two")
    monkeypatch.undo()
    _append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with 16 MiB; skips where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(
    federation: Any, three: dict[int, str], unbroken: bytes, small_disk: Path
) -> None:
    federation.folder = small_disk / "run"
    ballast = small_disk / "ballast"

    room = 0

    def behave(site: str, kind: str, round: int, *messages: Any) -> Any:
        if round == 2 and kind == "train" and not ballast.exists():
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - room))
        return messages[-1]

    for room in (0, 4096, len(unbroken) // 2):  # noqa: B007 (from no event to half a checkpoint)
        shutil.rmtree(federation.folder, ignore_errors=True)
        with pytest.raises(RunError, match=r"No space left on device|bytes were written") as caught:
            federation.run(federation.sites(dict(three), behave), quorum=3)
        assert str(caught.value).count("--resume") == 1
        assert_nothing_half_written(federation.folder)
        found = run_folder.newest_checkpoint(federation.folder / "checkpoints")
        assert found is not None
        assert found[0].round == 1
        ballast.unlink()
        federation.run(federation.sites(dict(three)), quorum=3, resume=True)
        assert federation.weights() == unbroken


SERVER = """
import sys
from pathlib import Path
from common.config import RunConfig
from deploy.simulation.local_grid import LocalGrid
from server.app import app
config = RunConfig.from_toml(Path(sys.argv[1]))
with LocalGrid(config.federation.sites, config.to_flat()) as grid:
    app(grid, grid.server_context(config.to_flat()))
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_of_a_round_then_resume_gives_the_same_model(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config({"rounds": 4, "federation.strategy": "fedadam"})
    with LocalGrid(3, config.to_flat()) as grid:
        app(grid, grid.server_context(config.to_flat()))
    unbroken = (tmp_path / "run" / "model.safetensors").read_bytes()
    seed = random.SystemRandom().randrange(2**32)
    print("random moments from seed", seed)
    moments = random.Random(seed)
    killed = config.with_changes({"run-dir": str(tmp_path / "killed")})
    folder = RunFolder(tmp_path / "killed")
    deaths = 0
    for _attempt in range(12):
        settings = tmp_path / "config.toml"
        settings.write_text(killed.with_changes({"resume": folder.config.exists()}).to_toml())
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(settings)],
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        before = rounds_done(folder)
        while process.poll() is None and deaths < 4 and rounds_done(folder) <= before:
            time.sleep(0.02)
        if deaths < 4 and process.poll() is None:
            time.sleep(moments.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, errors.decode()
            break
        deaths += 1
    assert deaths >= 2
    assert folder.path.joinpath("model.safetensors").read_bytes() == unbroken
    assert [e["round"] for e in read_json_lines(folder.metrics) if e["event"] == "round"] == [1, 2, 3, 4]


def rounds_done(folder: RunFolder) -> int:
    return max((e["round"] for e in read_json_lines(folder.metrics) if e["event"] == "round"), default=0)
