"""The supervisor on programs of a few lines: restarts, refusals, order, logs, and that nothing is left."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from common.errors import RunError, UserError
from deploy.consortium import child, daemon, supervisor
from deploy.consortium.processes import end, lookup, members
from deploy.consortium.program import Program, answers, says
from deploy.consortium.supervisor import SupervisorState, read_state

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


class Running:
    """A supervisor in a process of its own, whose programs are given as source code."""

    def __init__(self, folder: Path, programs: str, settings: str = "") -> None:
        self.state, self.logs = folder / "state", folder / "logs"
        source = f"""
import logging, sys
from pathlib import Path
from deploy.consortium import child, program
from deploy.consortium.program import Program, Remedy, answers, says
from deploy.consortium.supervisor import Supervisor
logging.basicConfig(level="INFO", stream=sys.stderr)
child.FIRST_PAUSE, child.LONGEST_PAUSE, child.GRACE = 0.1, 0.4, 2.0
python = lambda code: (sys.executable, "-S", "-c", code)
SLEEP = {SLEEP!r}
{settings}
Supervisor([{programs}], Path({str(self.state)!r}), Path({str(self.logs)!r}), {{"COLOUR": "blue"}}).run()
"""
        self.process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)

    @property
    def now(self) -> SupervisorState:
        found = read_state(self.state)
        assert found is not None
        return found

    def status(self, name: str) -> str:
        if not (self.state / "supervisor.json").exists():
            return ""
        return next(p.status.value for p in self.now.programs if p.name == name)

    def pid(self, name: str) -> int:
        found = next(p.pid for p in self.now.programs if p.name == name)
        assert found is not None
        return found

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(programs: str, settings: str = "") -> Running:
        started.append(Running(tmp_path, programs, settings))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.terminate()
        running.process.communicate(timeout=30)
        found = read_state(running.state)
        if found is not None:
            end(found.living, 1.0)


def test_a_killed_program_comes_back_with_its_environment_and_its_log(run: Callable[..., Running]) -> None:
    colour = "import os, time; print('colour', os.environ['COLOUR'], flush=True); time.sleep(600)"
    running = run(f"Program('a', python({colour!r}), ready=says('colour'))")
    wait_for(lambda: running.status("a") == "ready")
    first = running.pid("a")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: running.status("a") == "ready" and running.pid("a") != first)
    assert running.log("a") == "colour blue\n" * 2
    assert running.now.programs[0].restarts == 1
    running.process.terminate()
    assert running.process.wait(20) == 0
    assert running.status("a") == "stopped"
    assert lookup(first) is None
    assert running.now.living() == []


def test_programs_wait_for_those_that_they_need(run: Callable[..., Running], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    go = tmp_path / "go"
    server = (
        f"import os, socket, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)\n"
        f"s = socket.create_server(('127.0.0.1', {port}))\ntime.sleep(600)"
    )
    running = run(
        f"Program('a', python({server!r}), ready=answers('127.0.0.1', {port})),"
        "Program('b', python(SLEEP), ready=says('up'), after=('a',))"
    )
    wait_for(lambda: running.status("a") == "starting")
    time.sleep(0.6)
    assert running.status("b") == "waiting"
    go.touch()
    wait_for(lambda: running.status("b") == "ready")


def test_a_refusal_is_retried_and_then_said(run: Callable[..., Running], tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    node = (
        f"import os, sys, time\nif not os.path.exists({str(allowed)!r}):\n"
        "    print('Exit Code: 305', flush=True); sys.exit(1)\nprint('up', flush=True); time.sleep(600)"
    )
    explain = (
        "explain = lambda end: "
        "Remedy('not registered', 5.0, 'perhaps', 0.1) if end.code == 305 and '305' in end.tail else None"
    )
    running = run(f"Program('node', python({node!r}), ready=says('up'), explain=explain)", explain)
    wait_for(lambda: running.status("node") == "restarting")
    assert running.now.programs[0].reason == "perhaps"
    wait_for(lambda: running.status("node") == "refused")
    assert running.now.programs[0].reason == "not registered"
    assert running.now.programs[0].restarts >= 2
    allowed.touch()
    wait_for(lambda: running.status("node") == "ready")
    assert running.now.programs[0].reason == ""


def test_what_no_restart_mends_ends_everything_and_says_why(run: Callable[..., Running]) -> None:
    broken = "print('Exit Code: 302', flush=True); raise SystemExit(1)"
    running = run(
        f"Program('good', python(SLEEP)), Program('bad', python({broken!r}), explain=explain)",
        "explain = lambda end: Remedy('the key is no EC key', hopeless=True) if end.code == 302 else None",
    )
    _, said = running.process.communicate(timeout=30)
    assert running.process.returncode == 1
    assert "bad ended with status 1: the key is no EC key" in said
    assert running.now.living() == []
    assert running.status("good") == "stopped"


def test_pauses_grow(run: Callable[..., Running]) -> None:
    running = run("Program('a', python('import time; print(time.time(), flush=True)'), ready=says('never'))")
    wait_for(lambda: running.status("a") == "restarting" and running.log("a").count("\n") >= 5)
    starts = [float(line) for line in running.log("a").split()]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert gaps[0] < gaps[3]
    assert gaps[3] > 0.4


def test_down_ends_grandchildren_even_of_a_supervisor_that_was_killed(run: Callable[..., Running]) -> None:
    spawn = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'],"
        " start_new_session={})\n"
        "print('child', p.pid, flush=True)\ntime.sleep(600)"
    )
    running = run(
        f"Program('a', python({spawn.format(False)!r}), ready=says('child')),"
        f"Program('b', python({spawn.format(True)!r}), ready=says('child'))"
    )
    wait_for(lambda: running.status("a") == "ready" and running.status("b") == "ready")
    grandchildren = [int(running.log(name).split()[1]) for name in "ab"]
    assert daemon.is_running(running.state)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    assert not daemon.is_running(running.state)
    assert daemon.describe(running.state, running.logs)["left_behind"] == 4
    assert daemon.stop(running.state) == 4
    assert [pid for pid in grandchildren if lookup(pid)] == []


def test_a_new_supervisor_clears_up_what_a_killed_one_left(run: Callable[..., Running]) -> None:
    first = run("Program('a', python(SLEEP), ready=says('up'))")
    wait_for(lambda: first.status("a") == "ready")
    left = first.pid("a")
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    second = run("Program('a', python(SLEEP), ready=says('up'))")
    wait_for(lambda: second.status("a") == "ready" and second.pid("a") != left)
    assert lookup(left) is None


def test_two_supervisors_do_not_share_a_folder(run: Callable[..., Running]) -> None:
    running = run("Program('a', python(SLEEP))")
    wait_for(lambda: running.status("a") == "ready")
    with pytest.raises(UserError, match="runs already"):
        daemon.refuse_running(running.state)
    second = run("Program('a', python(SLEEP))")
    _, said = second.process.communicate(timeout=30)
    assert second.process.returncode == 1
    assert "already running" in said
    assert running.process.poll() is None


def test_another_process_in_a_reused_group_is_not_ours() -> None:
    with subprocess.Popen(python(SLEEP), stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            found = lookup(process.pid)
            assert found is not None
            assert members({process.pid: found.started}) == [process.pid]
            assert members({process.pid: found.started - 1}) == []
        finally:
            process.kill()


def test_a_long_log_is_kept_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOG_BYTES", 10_000)
    shout = "import time\nfor n in range(400):\n    print('x' * 100, n, flush=True); time.sleep(0.005)"
    one = child.Child(Program("a", python(shout)), dict(os.environ), tmp_path, tmp_path)
    until = time.monotonic() + 10
    while time.monotonic() < until and one.state.restarts == 0:
        one.step(set())
        time.sleep(0.01)
    one.stop()
    assert (tmp_path / "a.log").stat().st_size < 20_000
    assert {path.name for path in tmp_path.glob("a.log*")} == {"a.log", "a.log.1", "a.log.2", "a.log.3"}
    assert "399" in "".join(path.read_text() for path in tmp_path.glob("a.log*"))


def test_a_full_disk_ends_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    one = supervisor.Supervisor([Program("a", python(SLEEP))], tmp_path / "state", tmp_path / "logs", {})
    monkeypatch.setattr(supervisor, "write_text", no_space)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        one.run()
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
    assert "supervisor.json cannot be written: No space left on device" in caplog.text
    assert not (tmp_path / "state" / "supervisor.json").exists()


def test_a_supervisor_that_ends_at_once_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such command"):
        daemon.start(["no-such-command"], tmp_path / "state", tmp_path / "logs", 20)


def test_probes() -> None:
    assert says("ID:")("SuperNode ID: 7")
    assert not says("ID:")("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe = answers("127.0.0.1", server.getsockname()[1])
        assert probe("")
    assert not probe("")
