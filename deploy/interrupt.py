"""Ctrl-C: one line that says where the command stopped and how to go on, at whatever moment it comes.

The first SIGINT raises KeyboardInterrupt, so that what is open is closed on the way out; later ones change
nothing. Whatever a library makes of the exception, the command ends with the line and with status 130.
Knows nothing of what the command does: that says where it is with ``at``.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
PATIENCE = 30.0
"""Seconds to close what is open; then SIGALRM ends the process as it is."""
AGAIN = 0.05
"""Seconds after which an interruption that Python had to swallow is raised once more."""

Place = Callable[[], str]


class _State:
    """Of this process: whether it was interrupted, and what to say."""

    happened = False
    place: Place = staticmethod(lambda: "before it was done: give the same command again")


def at(place: str | Place) -> None:
    """Say where the command is and how to go on, in the words that follow ``stopped``."""
    _State.place = (lambda: place) if isinstance(place, str) else place


def happened() -> bool:
    """Whether Ctrl-C has come."""
    return _State.happened


@contextmanager
def told() -> Iterator[None]:
    """Run a command; after Ctrl-C print the one line and exit with STATUS. Nested uses count once.

    Raises:
        SystemExit: Ctrl-C came; or what the command raises.
    """
    # A shell starts background jobs with SIGINT ignored: then it stays so.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _State.happened = False
    signal.signal(signal.SIGINT, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _again
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else None
        # A command that ends by Ctrl-C alone, such as a live table, has ended well.
        ended_well = isinstance(error, SystemExit) and not status
        if status != STATUS and (ended_well or not _State.happened):
            raise
        sys.stderr.write(f"stopped {_State.place()}\n")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(STATUS)
    finally:
        sys.unraisablehook = hook
        if not _State.happened:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def held_off() -> Iterator[None]:
    """Start processes that never see the terminal's Ctrl-C: they inherit that SIGINT is blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(_sign: int, _frame: FrameType | None) -> None:
    if _State.happened:
        return
    _State.happened = True
    # No thread is started here: the main thread may hold the very lock that this would take.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    raise KeyboardInterrupt


def _again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise an interruption anew that came where Python can raise nothing, as in a finaliser."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _State.happened = False
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
