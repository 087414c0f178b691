"""A kit's programs in the foreground: order, the end of one, signals, state, and that nothing is left."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from deploy.cli.main import app
from deploy.consortium import foreground
from deploy.consortium.foreground import Program, describe, logs_text, port_answers
from deploy.consortium.kit import SiteKit

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process lives; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def kit(tmp_path: Path) -> SiteKit:
    folder = tmp_path / "kit"
    folder.mkdir()
    made = SiteKit(consortium="c", app_hash="0" * 64, site="a", server="127.0.0.1", port=8443).at(folder)
    made.save()
    return made


class Running:
    """A command that runs programs, given as source code, in a process of its own."""

    def __init__(self, kit: SiteKit, programs: str, settings: str = "") -> None:
        self.kit = kit
        source = f"""
import logging, sys
from pathlib import Path
from deploy.consortium import foreground
from deploy.consortium.foreground import Diagnosis, Program, logs_text, port_answers
from deploy.consortium.kit import SiteKit
from common.errors import FedbagsError, UserError
logging.basicConfig(level="INFO", stream=sys.stderr)
foreground._GRACE = 2.0
python = lambda code: (sys.executable, "-S", "-c", code)
SLEEP = {SLEEP!r}
{settings}
try:
    foreground.run(SiteKit.load(Path({str(kit.folder)!r})), [{programs}])
except FedbagsError as error:
    print(error, file=sys.stderr)
    sys.exit(2 if isinstance(error, UserError) else 1)
"""
        self.process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)

    def program(self, name: str) -> dict[str, Any]:
        found = (program for program in describe(self.kit)["programs"] if program["name"] == name)
        return next(found, {"status": "", "pid": None, "reason": ""})

    def status(self, name: str) -> str:
        return str(self.program(name)["status"])

    def log(self, name: str) -> str:
        return (self.kit.logs / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture
def run(kit: SiteKit) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(programs: str, settings: str = "") -> Running:
        started.append(Running(kit, programs, settings))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.terminate()
        running.process.communicate(timeout=30)
    foreground.stop(kit)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_with_status_0(
    run: Callable[..., Running], kit: SiteKit, sign: signal.Signals
) -> None:
    home = "import os, time; print('home', os.environ['FLWR_HOME'], flush=True); time.sleep(600)"
    running = run(f"Program('a', python({home!r}), ready=logs_text('home')), Program('b', python(SLEEP))")
    wait_for(lambda: describe(kit)["ready"])
    pids = [running.program(name)["pid"] for name in "ab"]
    assert running.log("a") == f"home {kit.flower_home}\n"
    running.process.send_signal(sign)
    assert running.process.wait(20) == 0
    assert (running.status("a"), running.status("b")) == ("stopped", "stopped")
    assert not any(map(alive, pids))
    assert describe(kit)["left_behind"] == 0


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
        f"Program('a', python({server!r}), ready=port_answers('127.0.0.1', {port})),"
        "Program('b', python(SLEEP), ready=logs_text('up'), after=('a',))"
    )
    wait_for(lambda: running.status("a") == "starting")
    time.sleep(0.6)
    assert running.status("b") == "waiting"
    go.touch()
    wait_for(lambda: running.status("b") == "ready")


def test_the_end_of_one_ends_all_and_says_its_status_and_last_lines(
    run: Callable[..., Running], kit: SiteKit
) -> None:
    broken = "print('first'); print('the last words', flush=True); raise SystemExit(3)"
    running = run(f"Program('good', python(SLEEP)), Program('bad', python({broken!r}))")
    _, said = running.process.communicate(timeout=30)
    assert running.process.returncode == 1
    assert (
        f"bad ended with status 3\nIts log is {kit.logs / 'bad.log'}; its last lines:\nfirst\nthe last words"
        in said
    )
    assert running.status("good") == "stopped"
    assert running.program("bad")["reason"] == "ended with status 3"
    assert describe(kit)["left_behind"] == 0


def test_a_killed_program_ends_all_and_its_signal_is_named(run: Callable[..., Running], kit: SiteKit) -> None:
    running = run("Program('a', python(SLEEP), ready=logs_text('up')), Program('b', python(SLEEP))")
    wait_for(lambda: describe(kit)["ready"])
    os.kill(int(running.program("a")["pid"]), signal.SIGKILL)
    _, said = running.process.communicate(timeout=30)
    assert running.process.returncode == 1
    assert "a ended by SIGKILL" in said


def test_a_refusal_stays_the_reason_until_the_next_start_is_ready(
    run: Callable[..., Running], tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    node = (
        f"import os, sys, time\ntime.sleep(1)\nif not os.path.exists({str(allowed)!r}):\n"
        "    print('Exit Code: 305', flush=True); sys.exit(1)\nprint('up', flush=True); time.sleep(600)"
    )
    settings = "found = lambda end: Diagnosis('not registered') if end.code == 305 else None"
    programs = f"Program('node', python({node!r}), ready=logs_text('up'), diagnose=found)"
    first = run(programs, settings)
    _, said = first.process.communicate(timeout=30)
    assert first.process.returncode == 1
    assert "node ended with status 1: not registered" in said
    assert (first.status("node"), first.program("node")["reason"]) == ("stopped", "not registered")
    allowed.touch()
    second = run(programs, settings)
    wait_for(lambda: second.status("node") == "starting")
    assert second.program("node")["reason"] == "not registered"
    wait_for(lambda: second.status("node") == "ready")
    assert second.program("node")["reason"] == ""


def test_a_mistake_that_starting_again_does_not_mend_is_status_2(run: Callable[..., Running]) -> None:
    running = run("Program('bad', python(\"print('Exit Code: 302', flush=True); raise SystemExit(1)\"))")
    _, said = running.process.communicate(timeout=30)
    assert running.process.returncode == 2
    assert "bad ended with status 1: node.key is not a key of the kind that Flower takes" in said


def test_down_ends_grandchildren_even_of_a_command_that_was_killed(
    run: Callable[..., Running], kit: SiteKit
) -> None:
    spawn = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'],"
        " start_new_session={})\n"
        "print('child', p.pid, flush=True)\ntime.sleep(600)"
    )
    running = run(
        f"Program('a', python({spawn.format(False)!r}), ready=logs_text('child')),"
        f"Program('b', python({spawn.format(True)!r}), ready=logs_text('child'))"
    )
    wait_for(lambda: bool(describe(kit)["ready"]))
    grandchildren = [int(running.log(name).split()[1]) for name in "ab"]
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    found = describe(kit)
    assert (found["running"], found["left_behind"]) == (False, 4)
    assert foreground.stop(kit) == 4
    assert not any(map(alive, grandchildren))
    assert foreground.stop(kit) == 0


def test_down_ends_the_command_and_what_it_runs(run: Callable[..., Running], kit: SiteKit) -> None:
    running = run("Program('a', python(SLEEP), ready=logs_text('up'))")
    wait_for(lambda: describe(kit)["ready"])
    threading.Thread(target=running.process.wait).start()
    assert foreground.stop(kit) == 2
    assert running.process.wait(10) == 0


def test_what_a_killed_command_left_is_ended_before_the_next_start(
    run: Callable[..., Running], kit: SiteKit, caplog: pytest.LogCaptureFixture
) -> None:
    first = run("Program('a', python(SLEEP), ready=logs_text('up'))")
    wait_for(lambda: describe(kit)["ready"])
    left = int(first.program("a")["pid"])
    with pytest.raises(UserError, match="runs already"):
        foreground.end_left_behind(kit)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    with caplog.at_level(logging.WARNING):
        foreground.end_left_behind(kit)
    assert "ending 1 process(es) that were left behind" in caplog.text
    assert not alive(left)


def test_a_kit_is_run_once_at_a_time(run: Callable[..., Running], kit: SiteKit) -> None:
    running = run("Program('a', python(SLEEP))")
    wait_for(lambda: describe(kit)["ready"])
    second = run("Program('a', python(SLEEP))")
    _, said = second.process.communicate(timeout=30)
    assert second.process.returncode == 2
    assert "it runs already" in said
    assert running.process.poll() is None


def test_a_kit_whose_name_begins_alike_is_another_one(run: Callable[..., Running], kit: SiteKit) -> None:
    run("Program('a', python(SLEEP), ready=logs_text('up'))")
    wait_for(lambda: describe(kit)["ready"])
    assert describe(kit.at(kit.folder.with_name("ki")))["left_behind"] == 0


def test_a_log_that_is_copied_and_emptied_goes_on(run: Callable[..., Running], kit: SiteKit) -> None:
    """As logrotate's copytruncate does it."""
    shout = "import time\nfor n in range(600): print('x' * 100, n, flush=True); time.sleep(0.05)"
    running = run(f"Program('a', python({shout!r}), ready=logs_text('x 20'))")
    wait_for(lambda: describe(kit)["ready"])
    os.truncate(kit.logs / "a.log", 0)
    wait_for(lambda: running.log("a").count("\n") > 2)
    assert "\0" not in running.log("a")
    assert running.status("a") == "ready"


def test_a_full_disk_ends_no_program(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foreground, "write_text", no_space)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        foreground.run(kit, [Program("a", python(SLEEP))])
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
    assert "programs.json cannot be written: No space left on device" in caplog.text
    assert not (kit.state / "programs.json").exists()


def test_probes() -> None:
    assert logs_text("ID:")("SuperNode ID: 7")
    assert not logs_text("ID:")("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe = port_answers("127.0.0.1", server.getsockname()[1])
        assert probe("")
    assert not probe("")


@pytest.mark.parametrize("role", ["server", "site"])
def test_the_removed_option_is_one_clear_sentence(kit: SiteKit, role: str) -> None:
    result = CliRunner().invoke(app, [role, "up", str(kit.folder), "--wait", "9"])
    assert isinstance(result.exception, UserError)
    assert "`status --wait SECONDS` waits" in str(result.exception)


def test_units_of_older_kits_still_start_it(kit: SiteKit) -> None:
    """They give --foreground; here it gets as far as the kit's first missing file."""
    result = CliRunner().invoke(app, ["site", "up", str(kit.folder), "--foreground"])
    assert isinstance(result.exception, UserError)
    assert "CA certificate not found" in str(result.exception)


def test_status_waits_as_long_as_asked_and_says_with_its_status(kit: SiteKit) -> None:
    begun = time.monotonic()
    result = CliRunner().invoke(app, ["site", "status", str(kit.folder), "--wait", "1"])
    assert result.exit_code == 1
    assert 1 <= time.monotonic() - begun < 10
    assert "was never started" in result.stdout
