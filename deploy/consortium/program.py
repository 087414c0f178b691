"""Describe a program to keep running, with its command, its readiness and the meaning of its end.

Nothing here starts anything, or knows Flower's programs and nginx.
"""

import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LONGEST_PAUSE = 30.0
"""The longest wait between two starts, seconds."""

Probe = Callable[[str], bool]
"""Whether a program is ready, given what it has logged since it was started."""


@dataclass(frozen=True)
class Remedy:
    """Describe the meaning of a program's end, and whether starting it again can help."""

    meaning: str
    patience: float = 0.0
    """Seconds of failing alike before ``meaning`` holds; until then ``meanwhile`` does."""
    meanwhile: str = ""
    pause: float = LONGEST_PAUSE
    """Seconds between two tries while patience lasts; afterwards the longest pause."""
    hopeless: bool = False
    """Nothing is started again: the supervisor ends everything and says why."""


@dataclass(frozen=True)
class Ending:
    """Describe the end of a program."""

    status: int
    """Of the process; minus the signal's number if a signal ended it."""
    code: int | None
    """The exit code that it printed, as Flower's programs do; None without one."""
    tail: str
    """The last that it logged."""


Explain = Callable[[Ending], Remedy | None]
"""What an end means; None for nothing in particular: start again."""


@dataclass(frozen=True)
class Program:
    """Describe one program to keep running."""

    name: str
    command: tuple[str, ...]
    ready: Probe = lambda _: True
    after: tuple[str, ...] = ()
    explain: Explain = lambda _: None
    sweep: bool = False
    """End what is left of its process group before it is started again."""
    environment: Mapping[str, str] = field(default_factory=dict)


def answers(host: str, port: int) -> Probe:
    """Return a probe that finds a program ready when a TCP port answers."""

    def probe(_: str) -> bool:
        # A short timeout: the supervisor asks one program after the other, and waits for each answer.
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5):
            return True
        return False

    return probe


def says(text: str) -> Probe:
    """Return a probe that finds a program ready when it has logged this text."""
    return lambda logged: text in logged
