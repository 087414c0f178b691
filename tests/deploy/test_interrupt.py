"""Ctrl-C at any moment: one line that says how to go on, status 130, no traceback and no process left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from deploy.cli.main import app

PATIENCE = 240.0
SMALL = ["--rounds", "40", "--set", "model.image-size=16", "--set", "model.atoms-per-class=2"]
RUN = ["simulate", "--out", "run", "--workers", "2", *SMALL]
SHORT_RUN = ["simulate", "--out", "run", "--workers", "1", *SMALL]

WATCHED = """
import os, sys, time

def watch(event, arguments):
    ours = (getattr(sys.modules["__main__"], "__file__", None) or "").endswith("fedbags.py")
    if ours and event == "import" and arguments[0] == os.environ.get("WAIT_AT"):
        del os.environ["WAIT_AT"]
        open(os.environ["REACHED"], "w").close()
        until = time.monotonic() + float(os.environ["WAIT_FOR"])
        while time.monotonic() < until:
            time.sleep(0.05)  # one long sleep would outlast a signal that comes just before it

sys.addaudithook(watch)
"""
"""Python runs this before fedbags.py: when that imports a module it says so, and may wait there."""

Moment = Callable[[Path, str], bool]
"""Whether the moment for Ctrl-C has come, by the folder and what was said on standard error."""


def start(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """The command as at a terminal: it and all that it starts are one process group."""
    with (folder / "stderr").open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fedbags", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )


def interrupt_at(
    folder: Path, moment: Moment, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[str], str, str]:
    """Start, wait for the moment, send SIGINT to the group as a terminal does, and wait for the end."""
    with start(folder, *arguments, environment=environment) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not moment(folder, (folder / "stderr").read_text()):
                assert process.poll() is None, (folder / "stderr").read_text()
                assert time.monotonic() < until
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process, out, (folder / "stderr").read_text()


def of_group(group: int) -> list[str]:
    """The living processes of a group."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and row[1][0] != "Z"]


def assert_stopped(process: subprocess.Popen[str], said: str, *parts: str) -> str:
    """One line, status 130, nothing left; returns the line."""
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "leaked" not in said
    lines = [line for line in said.splitlines() if line.startswith("stopped ")]
    assert len(lines) == 1, said
    for part in parts:
        assert part in lines[0]
    until = time.monotonic() + 5.0
    while of_group(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert of_group(process.pid) == []
    return lines[0]


class ImportOf:
    """The moment some seconds after the command has come to import a module.

    Args:
        folder: an empty folder.
        module: what fedbags.py or something that it imports imports.
        wait: whether the command stays there, so that Ctrl-C comes at that import; else it goes on.
        seconds: how long after.
    """

    def __init__(self, folder: Path, module: str, *, wait: bool, seconds: float = 0.0) -> None:
        (folder / "sitecustomize.py").write_text(WATCHED)
        self.reached, self.seconds = folder / "reached", seconds
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.environment = {
            "PYTHONPATH": path,
            "WAIT_AT": module,
            "WAIT_FOR": str(PATIENCE if wait else 0),
            "REACHED": str(self.reached),
        }

    def __call__(self, folder: Path, said: str) -> bool:
        if not self.reached.exists():
            return False
        time.sleep(self.seconds)
        return True


def has(pattern: str) -> Moment:
    return lambda folder, said: any(folder.glob(pattern))


def round_done(folder: Path, said: str) -> bool:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.exists() and '"event": "round"' in metrics.read_text()


@pytest.mark.parametrize("module", ["pathlib", "deploy.simulation", "typer", "torch", "torch.nn"])
def test_while_libraries_are_loaded_there_is_one_line_and_nothing_is_left(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, module: str
) -> None:
    """At the first import of fedbags.py, at the handover to the command line, and in what that loads."""
    at = ImportOf(tmp_path_factory.mktemp("watched"), module, wait=True)
    process, _, said = interrupt_at(tmp_path, at, *RUN, environment=at.environment)
    assert_stopped(process, said, "give the same command again")
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.05, 0.15, 0.6, 1.5])
def test_at_any_time_after_the_first_line_there_is_one_line_and_nothing_is_left(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, seconds: float
) -> None:
    at = ImportOf(tmp_path_factory.mktemp("watched"), "pathlib", wait=False, seconds=seconds)
    process, _, said = interrupt_at(tmp_path, at, *RUN, environment=at.environment)
    assert_stopped(process, said, "give the same command again")
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


def test_a_program_that_imports_fedbags_keeps_its_own_interrupt() -> None:
    code = "import signal, fedbags; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_before_the_first_round_what_was_drawn_is_removed(tmp_path: Path) -> None:
    process, _, said = interrupt_at(tmp_path, has("run/*sites*"), *SHORT_RUN)
    assert_stopped(process, said, "nothing was trained", "same command")
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


def test_in_a_run_the_line_is_the_command_that_goes_on(sites_dir: Path, tmp_path: Path) -> None:
    """The short form of the next: one worker, and the command that goes on is given in this process."""
    process, _, said = interrupt_at(tmp_path, round_done, *SHORT_RUN, "--sites-dir", str(sites_dir))
    line = assert_stopped(process, said, "of 40", "`fedbags simulate --out run --resume`")
    command = line.partition("`fedbags ")[2].rstrip("`").split()
    with contextlib.chdir(tmp_path):
        error = CliRunner().invoke(app, [*command, "--set", "rounds=41", "--no-figures"]).exception
    assert isinstance(error, UserError)
    assert "--resume goes on with the same configuration" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [has("run/config.toml"), round_done])
def test_at_any_moment_of_a_run_the_line_is_the_command_that_goes_on(
    sites_dir: Path, tmp_path: Path, moment: Moment
) -> None:
    process, _, said = interrupt_at(tmp_path, moment, *RUN, "--sites-dir", str(sites_dir))
    line = assert_stopped(process, said, "of 40", "`fedbags simulate --out run --resume`")
    command = line.partition("`fedbags ")[2].rstrip("`").split()
    done = start(tmp_path, *command, "--set", "rounds=41", "--no-figures")
    done.communicate(timeout=PATIENCE)
    assert done.returncode == 2
    assert "--resume goes on with the same configuration" in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_while_figures_are_drawn_the_run_is_complete(sites_dir: Path, tmp_path: Path) -> None:
    short = ["1" if word == "40" else word for word in RUN]
    process, _, said = interrupt_at(tmp_path, has("run/summary.json"), *short, "--sites-dir", str(sites_dir))
    assert_stopped(process, said, "the run was complete")
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_killed_command_takes_its_workers_along(sites_dir: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *RUN, "--sites-dir", str(sites_dir))
    until = time.monotonic() + PATIENCE
    while not round_done(tmp_path, ""):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(of_group(process.pid)) > 2
    process.kill()
    process.communicate()
    until = time.monotonic() + 10.0
    while (left := of_group(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


@pytest.mark.slow
def test_bags_build_leaves_nothing(tmp_path: Path) -> None:
    build = ["bags", "build", "--source", "synthetic", "--sites", "2", "--out", "sites"]
    process, _, said = interrupt_at(tmp_path, has("*sites*"), *build)
    assert_stopped(process, said, "same command")
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


def test_within_code_from_a_text_the_status_is_the_same(tmp_path: Path) -> None:
    """Such code is that of a dataclass, while libraries are loaded."""
    (tmp_path / "command.py").write_text(
        "import os, signal\nfrom deploy.simulation import interrupt\n"
        "with interrupt.handled():\n    exec('os.kill(os.getpid(), signal.SIGINT)')\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "command"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        130,
        "stopped before it was done: give the same command again\n",
    )
