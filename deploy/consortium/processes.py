"""Find the processes that a supervisor started on this machine, and end them (Linux, from /proc).

A process is known to be ours by the process group that we made for it, or by the mark that it inherited in
its environment; both outlive the supervisor and the process that was first started. A group is told from a
later one of the same number by the start time of its leader. Nothing here knows what the processes do.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

MARK = "FEDBAGS_SUPERVISOR"
"""Environment variable that every process of a supervisor inherits: the supervisor's own random name."""

_PROC = Path("/proc")
_PATIENCE_AFTER_KILL = 5.0


@dataclass(frozen=True)
class Process:
    """Hold one line of the process table."""

    pid: int
    group: int
    started: int
    """Clock ticks since boot: with the pid, it names a process for good."""


def require_proc() -> None:
    """Raise a UserError where there is no Linux process table."""
    if not (_PROC / "self" / "stat").exists():
        raise UserError(
            "supervising processes needs Linux (/proc is missing): use the kit's compose file on this machine"
        )


def lookup(pid: int) -> Process | None:
    """Return the living process with this id, or None.

    A process that has ended and waits to be reaped counts as none.
    """
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # Counted from the last parenthesis, since a program's name may hold blanks and parentheses. rest[16] is
    # field 22 of /proc/PID/stat, the start time in clock ticks.
    state, _, group, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else Process(pid, int(group), int(rest[16]))


def members(groups: Mapping[int, int], mark: str | None = None) -> list[int]:
    """Return the ids of the living processes that are ours.

    Args:
        groups: process groups that we made, with the start time of each one's leader.
        mark: the value of MARK in their environment, to find also those that left their group.
    """
    leaders = {group: lookup(group) for group in groups}
    # A leader that is gone may have left members. Linux gives its number to no new process while they live.
    ours = {group for group, leader in leaders.items() if leader is None or leader.started == groups[group]}
    return [
        process.pid
        for process in _all()
        if process.group in ours or (mark is not None and _has_mark(process.pid, mark))
    ]


def end(ours: Callable[[], list[int]], grace: float) -> list[int]:
    """Ask the processes to end, make them end after ``grace`` seconds, and return those that would not."""
    for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, _PATIENCE_AFTER_KILL)):
        until = time.monotonic() + patience
        # Listed anew for each signal, as a process that ends may have started others.
        for pid in ours():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        while (left := ours()) and time.monotonic() < until:
            time.sleep(0.1)
        if not left:
            break
    return left


def _all() -> Iterator[Process]:
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (process := lookup(int(entry.name))) is not None:
            yield process


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        # It has ended, or belongs to another user.
        return False
