"""Start a set of programs, keep them running, and write down their state.

A program that ends is started again, later each time (``child``). What runs is in ``supervisor.json``, from
which ``daemon`` describes and ends it. Nothing here knows Flower's programs or nginx.
"""

import fcntl
import logging
import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict

from common.errors import UserError
from common.files import write_text
from deploy.consortium.child import GRACE, Child, ProgramState, Status
from deploy.consortium.processes import MARK, end, lookup, members, require_proc
from deploy.consortium.program import Program

log = logging.getLogger("fedbags.supervisor")

POLL = 0.25
STATE_FILE, LOCK_FILE = "supervisor.json", "supervisor.lock"


class SupervisorState(BaseModel):
    """Hold the content of supervisor.json."""

    model_config = ConfigDict(extra="forbid")

    mark: str
    pid: int
    started: int
    programs: list[ProgramState]

    def living(self) -> list[int]:
        """Return the ids of all living processes that this supervisor started."""
        return members({g: t for p in self.programs for g, t in p.groups.items()}, self.mark)


def read_state(folder: Path) -> SupervisorState | None:
    """Return the state that the last supervisor of this folder wrote, or None if there was none."""
    path = folder / STATE_FILE
    return SupervisorState.model_validate_json(path.read_bytes()) if path.exists() else None


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a state folder, and yield False if a supervisor holds it already."""
    with (folder / LOCK_FILE).open("a") as stream:
        try:
            # The kernel drops the lock when its holder dies: a killed supervisor leaves none behind.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class Supervisor:
    """Run programs until a signal asks to stop.

    Args:
        programs: in the order in which to start them.
        state: the folder of supervisor.json; made if missing.
        logs: the folder of the programs' logs; made if missing.
        environment: of every program, over that of this process.
    """

    def __init__(
        self, programs: Sequence[Program], state: Path, logs: Path, environment: Mapping[str, str]
    ) -> None:
        self._folder, self._mark = state, uuid.uuid4().hex
        everywhere = {**os.environ, **environment, MARK: self._mark}
        self._children = [Child(program, everywhere, state, logs) for program in programs]
        self._stopping = False
        self._written = ""

    def run(self) -> None:
        """Start everything and keep it running until SIGTERM or SIGINT, then end it all.

        Raises:
            UserError: another supervisor runs in this folder, or this is not Linux.
            RunError: a program ended in a way that no restart mends.
        """
        require_proc()
        for folder in (self._folder, *(child.log.parent for child in self._children)):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock(self._folder) as ours:
            if not ours:
                raise UserError(
                    f"already running, see {self._folder / STATE_FILE}; stop it with `down` first"
                )
            # What a killed supervisor left still holds ports and files that the programs need.
            if (before := read_state(self._folder)) is not None and (left := before.living()):
                log.warning("ending %d process(es) that an earlier supervisor left behind", len(left))
                end(before.living, GRACE)
            for sign in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sign, self._stop)
            try:
                while not self._stopping:
                    self._step()
                    time.sleep(POLL)
            finally:
                self._end()

    def _stop(self, _sign: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _step(self) -> None:
        ready = {child.state.name for child in self._children if child.state.status is Status.READY}
        try:
            for child in self._children:
                child.step(ready)
        finally:
            self._write()

    def _end(self) -> None:
        # In reverse order, so that each program ends before those that it waits for.
        for child in reversed(self._children):
            child.stop()
        self._write()
        if left := end(self._state().living, GRACE):
            log.error("these processes would not end: %s", left)

    def _state(self) -> SupervisorState:
        own = lookup(os.getpid())
        return SupervisorState(
            mark=self._mark,
            pid=os.getpid(),
            started=own.started if own else 0,
            programs=[child.state for child in self._children],
        )

    def _write(self) -> None:
        text = self._state().model_dump_json(indent=2)
        if text == self._written:
            return
        try:
            write_text(self._folder / STATE_FILE, text, 0o600)
            self._written = text
        # A full disk must not end what runs. The next change is written again.
        except OSError as error:
            log.error("%s cannot be written: %s", STATE_FILE, error.strerror)
