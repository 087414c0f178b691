"""Run a kit's programs in the foreground until one of them ends or a signal comes, and tell their state.

Nothing is started again here, and no log is rotated: that is a service manager's work (systemd, compose, the
supervisor package). What runs is in the kit's state/programs.json, from which another process describes and
ends it. Nothing here knows the programs' arguments.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from common.errors import RunError, UserError
from common.files import write_text
from deploy.consortium.kit import CoordinatorKit, Kit
from deploy.flower.processes import MISTAKES, end, environment, exit_code, tail, with_variable

log = logging.getLogger("fedbags.programs")

COMMAND = (sys.executable, "-P", "-c", "from deploy.cli.main import main; main()")
"""The fedbags command of this installation, whatever the PATH and the working directory."""

_KIT_VARIABLE = "FEDBAGS_KIT"
"""Environment variable by which the processes of a kit are found, also those that left their parents."""

_POLL, _GRACE, _END_DEADLINE = 0.25, 8.0, 90.0
_TASK_POLL_SECONDS = "0.2"
_STATE_FILE, _LOCK_FILE = "programs.json", "programs.lock"
_LOG_START, _END_LINES, _SHOWN_LINES = 2**20, 60, 12

_Probe = Callable[[str], bool]
"""Whether a program is ready, given what it has logged since it was started."""


@dataclass(frozen=True)
class Exit:
    """Describe the end of a program."""

    status: int
    """Of the process; minus the signal's number if a signal ended it."""
    code: int | None
    """The exit code that it printed, as Flower's programs do; None without one."""
    tail: str
    """The last lines of its log."""


@dataclass(frozen=True)
class Diagnosis:
    """Explain the end of a program."""

    text: str
    mistake: bool = False
    """Starting again does not mend it, so that the command ends with status 2."""


def diagnose(end: Exit) -> Diagnosis | None:
    """Return the meaning of an exit code of Flower's, or None where starting again may help."""
    if end.code in MISTAKES:
        return Diagnosis(f"{MISTAKES[end.code]} (Flower's exit code {end.code})", mistake=True)
    return None


@dataclass(frozen=True)
class Program:
    """Describe one program to run."""

    name: str
    command: tuple[str, ...]
    ready: _Probe = lambda _: True
    after: tuple[str, ...] = ()
    """Programs that must be ready before this one is started."""
    diagnose: Callable[[Exit], Diagnosis | None] = diagnose


class _Status(StrEnum):
    """Name the states of a program."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class _ProgramState(BaseModel):
    """Hold the state of one program as programs.json records it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    status: _Status = _Status.WAITING
    pid: int | None = None
    since: float = 0.0
    """Unix time, seconds."""
    reason: str = ""
    """Why it ended last; empty once it is ready."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    pid: int
    programs: list[_ProgramState]

    @property
    def ready(self) -> bool:
        return all(program.status is _Status.READY for program in self.programs)


def run(kit: Kit, programs: Sequence[Program]) -> None:
    """Start programs and stay until SIGTERM or SIGINT comes or one of them ends, then end them all.

    Args:
        kit: whose they are; state and logs are written into its folder.
        programs: in the order in which to start them; they are ended in the reverse order.

    Raises:
        UserError: they run already, or one ended by a mistake that starting again does not mend.
        RunError: one of them ended.
    """
    for folder in (kit.state, kit.logs):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(kit)
    try:
        lock.acquire()
    except Timeout:
        raise _running_already(kit) from None
    try:
        _Foreground(kit, programs).run()
    finally:
        lock.release()


def end_left_behind(kit: Kit) -> None:
    """End what a command that was killed left of a kit's programs.

    Raises:
        UserError: the programs run, so that nothing is left behind.
    """
    if _is_running(kit):
        raise _running_already(kit)
    # They still hold ports and files that the programs need.
    if left := _processes(kit):
        log.warning("ending %d process(es) that were left behind", len(left))
        end(lambda: _processes(kit), _GRACE)


def stop(kit: Kit) -> int:
    """End the command that runs a kit's programs, and every process that it or one before it started.

    Returns:
        How many processes were ended; 0 when nothing ran.

    Raises:
        RunError: some would not end.
    """
    found, running = _read(kit), len(_processes(kit))
    if found is not None and _is_running(kit):
        running += 1
        os.kill(found.pid, signal.SIGTERM)
        until = time.monotonic() + _END_DEADLINE
        while _is_running(kit) and time.monotonic() < until:
            time.sleep(_POLL)
        if _is_running(kit):
            with suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
    if left := end(lambda: _processes(kit), _GRACE):
        raise RunError(f"these processes would not end: {', '.join(map(str, left))}")
    return running


def describe(kit: Kit) -> dict[str, Any]:
    """Return the state of a kit's programs.

    Returns:
        ``{running, ready, left_behind, programs: [{name, status, pid, since, reason, log}]}``; times are ISO
            8601 in UTC, ``left_behind`` counts processes of a command that was killed.
    """
    found, running = _read(kit), _is_running(kit)
    programs = [
        {
            "name": program.name,
            "status": program.status.value if running else _Status.STOPPED.value,
            "pid": program.pid if running else None,
            "since": datetime.fromtimestamp(program.since, UTC).isoformat(timespec="seconds"),
            "reason": program.reason,
            "log": str(kit.logs / f"{program.name}.log"),
        }
        for program in (found.programs if found else [])
    ]
    return {
        "running": running,
        "ready": running and found is not None and found.ready,
        "left_behind": 0 if running else len(_processes(kit)),
        "programs": programs,
    }


def _kit_environment(kit: Kit) -> dict[str, str]:
    """Return what is set in the environment of every program of a kit."""
    own = (kit.server.admin_address,) if isinstance(kit, CoordinatorKit) else ()
    return environment(kit.flower_home, *own) | {
        _KIT_VARIABLE: _mark(kit),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _TASK_POLL_SECONDS,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def port_answers(host: str, port: int) -> _Probe:
    """Return a probe that finds a program ready when a TCP port answers."""

    def probe(_: str) -> bool:
        # A short timeout: one program is asked after the other.
        with suppress(OSError), socket.create_connection((host, port), timeout=0.5):
            return True
        return False

    return probe


def logs_text(text: str) -> _Probe:
    """Return a probe that finds a program ready when it has logged this text."""
    return lambda logged: text in logged


class _Foreground:
    def __init__(self, kit: Kit, programs: Sequence[Program]) -> None:
        self._kit = kit
        before = _read(kit)
        reasons = {program.name: program.reason for program in before.programs} if before else {}
        variables = os.environ | _kit_environment(kit)
        self._children = [
            _Child(program, variables, kit, reasons.get(program.name, "")) for program in programs
        ]
        self._stopping = False
        self._written = ""

    def run(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, self._stop)
        try:
            while not self._stopping:
                ready = {child.state.name for child in self._children if child.state.status is _Status.READY}
                for child in self._children:
                    child.step(ready)
                self._write()
                time.sleep(_POLL)
        finally:
            for child in reversed(self._children):
                child.stop()
            self._write()
            if left := end(lambda: _processes(self._kit), _GRACE):
                log.error("these processes would not end: %s", left)

    def _stop(self, _sign: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _write(self) -> None:
        state = _State(pid=os.getpid(), programs=[child.state for child in self._children])
        text = state.model_dump_json(indent=2)
        if text == self._written:
            return
        try:
            write_text(self._kit.state / _STATE_FILE, text, 0o600)
            self._written = text
        # A full disk must not end what runs. The next change is written again.
        except OSError as error:
            log.error("%s cannot be written: %s", _STATE_FILE, error.strerror)


class _Child:
    def __init__(self, program: Program, environment: Mapping[str, str], kit: Kit, reason: str) -> None:
        self.state = _ProgramState(name=program.name, since=time.time(), reason=reason)
        self._program, self._environment, self._cwd = program, environment, kit.state
        self._log = kit.logs / f"{program.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._offset = 0

    def step(self, ready: set[str]) -> None:
        if self._process is None:
            if set(self._program.after) <= ready:
                self._start()
        elif (status := self._process.poll()) is not None:
            self._ended(status)
        elif self.state.status is not _Status.READY and self._program.ready(self._logged()):
            self._become(_Status.READY, "")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self.state.pid = None
        self._become(_Status.STOPPED, self.state.reason)

    def _start(self) -> None:
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        # Opened for appending, so that logrotate can copy and empty the file while the program writes to it.
        with self._log.open("ab") as stream:
            # In a session of its own it does not get the terminal's Ctrl-C, and is ended in order.
            self._process = subprocess.Popen(
                self._program.command, cwd=self._cwd, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        self.state.pid = self._process.pid
        # The last reason stays until it is ready: a site that is refused again and again shows why.
        self._become(_Status.STARTING, self.state.reason)

    def _ended(self, status: int) -> None:
        self._process = None
        last = tail(self._log, _END_LINES, self._offset)
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        found = self._program.diagnose(Exit(status, exit_code(last), last))
        self.state.reason = found.text if found else how
        text = f"{self._program.name} {how}" + (f": {found.text}" if found else "")
        lines = "\n".join(last.splitlines()[-_SHOWN_LINES:])
        shown = f"; its last lines:\n{lines}" if lines.strip() else "."
        error = UserError if found and found.mistake else RunError
        raise error(f"{text}\nIts log is {self._log}{shown}")

    def _become(self, status: _Status, reason: str) -> None:
        if (status, reason) == (self.state.status, self.state.reason):
            return
        self.state.status, self.state.reason, self.state.since = status, reason, time.time()
        log.info("%s: %s", self._program.name, status.value)

    def _logged(self) -> str:
        with self._log.open("rb") as stream:
            # A log that was rotated meanwhile is shorter than where this program began.
            stream.seek(min(self._offset, stream.seek(0, os.SEEK_END)))
            return stream.read(_LOG_START).decode("utf-8", errors="replace")


def _is_running(kit: Kit) -> bool:
    if not kit.state.is_dir():
        return False
    # The lock and not the file: the kernel frees it when its holder is killed, and the file stays.
    try:
        with _lock(kit):
            return False
    except Timeout:
        return True


def _mark(kit: Kit) -> str:
    # With a slash at the end, so that no folder of a longer name is meant too.
    return f"{kit.folder.resolve()}/"


def _processes(kit: Kit) -> list[int]:
    return with_variable(_KIT_VARIABLE, _mark(kit))


def _read(kit: Kit) -> _State | None:
    path = kit.state / _STATE_FILE
    return _State.model_validate_json(path.read_bytes()) if path.exists() else None


def _lock(kit: Kit) -> FileLock:
    return FileLock(kit.state / _LOCK_FILE, timeout=0)


def _running_already(kit: Kit) -> UserError:
    return UserError(f"it runs already (see {kit.state}). `status` shows how it is, `down` ends it.")
