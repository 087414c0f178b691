"""End a command on Ctrl-C with one line that says where it stopped and how to go on.

This holds at whatever moment Ctrl-C comes. The first SIGINT raises KeyboardInterrupt, so that what is open is
closed on the way out; later ones change nothing. Whatever a library makes of the exception, the command ends
with the line and with status 130. Knows nothing of what the command does: that says where it is with ``at``.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STATUS = 130
_PATIENCE = 30.0
"""Seconds to close what is open; then SIGALRM ends the process as it is."""
_AGAIN = 0.05
"""Seconds after which an interruption that Python had to swallow is raised once more."""

_Place = Callable[[], str]


class _State:
    """Hold whether this process was interrupted, and what to print then."""

    happened = False
    place: _Place = staticmethod(lambda: "before it was done: give the same command again")


def at(place: str | _Place) -> None:
    """Set where the command is and how to go on, in the words that follow ``stopped``."""
    _State.place = (lambda: place) if isinstance(place, str) else place


@contextmanager
def handled() -> Iterator[None]:
    """Run a command, and after Ctrl-C print the one line and exit with ``_STATUS``.

    Nested uses count once.

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
        if status != _STATUS and (ended_well or not _State.happened):
            raise
        sys.stderr.write(f"stopped {_State.place()}\n")
        # Another Ctrl-C must not break into the end of the process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Of Ctrl-C within code from a text, such as that of a dataclass, Python remembers that nothing caught
        # it, and `python -m` would end by the signal and not with the status. The next text makes it forget.
        exec("")
        sys.exit(_STATUS)
    finally:
        sys.unraisablehook = hook
        if not _State.happened:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def held_off() -> Iterator[None]:
    """Block SIGINT while processes are started, so that they never get the terminal's Ctrl-C.

    A process inherits which signals are blocked when it is started.
    """
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
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    raise KeyboardInterrupt


def _again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise an interruption anew that came where Python can raise nothing, as in a finaliser."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _State.happened = False
    # By an alarm, since raising here would be swallowed again. _interrupt must take it for the first Ctrl-C.
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
