"""Start one supervised program, start it again when it ends, and keep its log and its state.

Nothing here knows other programs than by the names that it waits for.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from common.errors import RunError
from deploy.consortium.processes import end, lookup, members
from deploy.consortium.program import LONGEST_PAUSE, Ending, Program

log = logging.getLogger("fedbags.supervisor")

GRACE, FIRST_PAUSE, STEADY = 8.0, 1.0, 60.0
LOG_BYTES, LOG_FILES = 10 * 2**20, 3
_EXIT_CODE = re.compile(r"Exit Code: (\d+)")
_READ, _TAIL = 2**20, 4000


class Status(StrEnum):
    """Name the states of a supervised program."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    PAUSED = "restarting"
    REFUSED = "refused"
    STOPPED = "stopped"


class ProgramState(BaseModel):
    """Hold the state of one program as supervisor.json records it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    status: Status = Status.WAITING
    pid: int | None = None
    since: float = 0.0
    """Unix time, seconds."""
    restarts: int = 0
    reason: str = ""
    groups: dict[int, int] = {}
    """Process groups made for it that may still have members, with their leaders' start times."""


class Child:
    """Keep one program running over all its starts and ends."""

    def __init__(self, program: Program, environment: Mapping[str, str], cwd: Path, logs: Path) -> None:
        self.program, self.state = program, ProgramState(name=program.name, since=time.time())
        self.log = logs / f"{program.name}.log"
        self._environment, self._cwd = {**environment, **program.environment}, cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._offset = 0
        self._start_at = self._steady_at = 0.0
        self._pause = FIRST_PAUSE
        self._failing_since: float | None = None

    def step(self, ready: set[str]) -> None:
        """Check the program once, and start it, start it again, or note that it is ready."""
        now = time.monotonic()
        if self._process is None:
            if set(self.program.after) <= ready and now >= self._start_at:
                self._start()
        elif (status := self._process.poll()) is not None:
            self._ended(status, now)
        elif self.state.status is not Status.READY:
            if self.program.ready(self._logged()):
                self._become(Status.READY, "")
                self._failing_since, self._steady_at = None, now + STEADY
        elif now >= self._steady_at:
            self._pause = FIRST_PAUSE
        self._rotate()

    def stop(self) -> None:
        """End the program and all that is left of what it started."""
        if left := end(self._members, GRACE):
            log.error("%s: %s would not end", self.program.name, left)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._process = None
        self.state.pid = None
        self._become(Status.STOPPED, "")

    def _start(self) -> None:
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        # Opened for appending, so that _rotate can empty the file while the program writes to it.
        with self.log.open("ab") as stream:
            # A session of its own makes a process group, by which the program's descendants are found later.
            self._process = subprocess.Popen(
                self.program.command, cwd=self._cwd, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        pid = self.state.pid = self._process.pid
        started = lookup(pid)
        # Groups of earlier starts stay listed while they have members, so that these are ended too.
        alive = {group: t for group, t in self.state.groups.items() if members({group: t})}
        self.state.groups = {**alive, pid: started.started if started else 0}
        if self.state.status is not Status.REFUSED:
            self._become(Status.STARTING, self.state.reason)

    def _ended(self, status: int, now: float) -> None:
        tail = self._tail()
        # Flower's programs print a code of their own, which tells more than the status of the process.
        codes = _EXIT_CODE.findall(tail)
        remedy = self.program.explain(Ending(status, int(codes[-1]) if codes else None, tail))
        if self.program.sweep:
            end(self._members, GRACE)
        self._process, self.state.pid = None, None
        self.state.restarts += 1
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if remedy is None:
            self._failing_since = None
            self._become(Status.PAUSED, how)
            self._start_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif remedy.hopeless:
            raise RunError(f"{self.program.name} {how}: {remedy.meaning}\nIts log is {self.log}")
        else:
            # Patience counts from the first of several such ends in a row, and not from the last.
            self._failing_since = now if self._failing_since is None else self._failing_since
            over = now - self._failing_since >= remedy.patience
            self._become(
                Status.REFUSED if over else Status.PAUSED, remedy.meaning if over else remedy.meanwhile
            )
            self._start_at = now + (LONGEST_PAUSE if over else remedy.pause)

    def _become(self, status: Status, reason: str) -> None:
        if (status, reason) == (self.state.status, self.state.reason):
            return
        self.state.status, self.state.reason, self.state.since = status, reason, time.time()
        log.info("%s: %s%s", self.program.name, status.value, f" ({reason})" if reason else "")

    def _members(self) -> list[int]:
        return members(self.state.groups)

    def _logged(self) -> str:
        """Return the beginning of what the program has logged since it was started."""
        with self.log.open("rb") as stream:
            stream.seek(self._offset)
            return stream.read(_READ).decode("utf-8", errors="replace")

    def _tail(self) -> str:
        """Return the end of what the program has logged since it was started."""
        with self.log.open("rb") as stream:
            stream.seek(max(self._offset, stream.seek(0, os.SEEK_END) - _TAIL))
            return stream.read().decode("utf-8", errors="replace")

    def _rotate(self) -> None:
        """Copy a long log to a numbered file and empty it.

        A rename would not do, because the program keeps its file open. It only appends to it.
        """
        if not self.log.exists() or self.log.stat().st_size < LOG_BYTES:
            return
        names = [self.log, *(self.log.with_name(f"{self.log.name}.{n}") for n in range(1, LOG_FILES + 1))]
        for older, newer in zip(reversed(names[2:]), reversed(names[1:-1]), strict=True):
            if newer.exists():
                newer.replace(older)
        try:
            shutil.copyfile(self.log, names[1])
        # On a full disk the copy fails, and emptying the log is what helps.
        except OSError as error:
            log.error("%s could not be kept: %s", names[1], error.strerror)
        os.truncate(self.log, 0)
        self._offset = 0
