"""Processes of cells: many at once, a failing one, Ctrl-C, and a queue that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deploy.compare.plan import _ORDER, LOG, run_all
from deploy.compare.run import _end_of_log

PATIENCE = 120.0
"""Seconds that a machine with other work may take to start an interpreter."""


def endless(folder: Path) -> Path:
    """A cell that waits forever: its order is a pipe that nobody writes to."""
    folder.mkdir()
    os.mkfifo(folder / _ORDER)
    return folder


def fields(pid: int | str) -> list[str]:
    """Of /proc/PID/stat, behind the name: state, parent, ...; nothing once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children(parent: int) -> set[int]:
    """Processes that this one has started and that have not ended."""
    everyone = {int(path.name): fields(path.name) for path in Path("/proc").glob("[0-9]*")}
    return {pid for pid, stat in everyone.items() if stat and stat[0] != "Z" and int(stat[1]) == parent}


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_cell_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()  # no order
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / _ORDER).write_text("{}")
    most = 0

    def look(running: Sequence[Path]) -> None:
        nonlocal most
        most = max(most, len(running))

    ended: dict[str, int] = {}
    folders = [tmp_path / "empty", tmp_path / "wrong"]
    run_all(folders, 2, look, lambda folder, status: ended.update({folder.name: status}))
    assert ended == {"empty": 1, "wrong": 1}
    assert most == 2
    told = _end_of_log(tmp_path / "empty", 1)
    assert "FileNotFoundError" in told
    assert told.endswith(f"(exit status 1; all of it: {tmp_path / 'empty' / LOG})")


def test_ctrl_c_ends_the_cells(tmp_path: Path) -> None:
    folders = [endless(tmp_path / "a"), endless(tmp_path / "b"), endless(tmp_path / "later")]
    before, started = children(os.getpid()), set[int]()

    def look(running: Sequence[Path]) -> None:
        assert len(running) <= 2
        started.update(children(os.getpid()) - before)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C: see run_all

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_all(folders, 2, look, lambda folder, status: pytest.fail("no cell ends by itself"))
    assert len(started) == 2
    assert not started & children(os.getpid())
    assert not (tmp_path / "later" / LOG).exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_cells_do_not_outlive_a_queue_that_is_killed(tmp_path: Path) -> None:
    endless(tmp_path / "cell")
    code = (
        "import sys; from pathlib import Path; from deploy.compare.plan import run_all; "
        "run_all([Path(sys.argv[1])], 1, lambda running: None, lambda folder, status: None)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path / "cell")]) as queue:
        try:
            wait_for(lambda: children(queue.pid))
            (cell,) = children(queue.pid)
            # It must have come so far that it listens for the end of its parent.
            wait_for(lambda: len(list(Path(f"/proc/{cell}/task").iterdir())) > 1)
        finally:
            queue.kill()
    wait_for(lambda: not fields(cell) or fields(cell)[0] == "Z")
