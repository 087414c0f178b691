"""Run Flower's SuperNode, and let it ask the coordinator for messages more often while a run goes on.

``fedbags site up`` starts it in place of ``flower-supernode``, with the same arguments::

    python -P -m deploy.consortium.supernode ARGUMENTS

One name in Flower is replaced and nothing else: the module ``time``, in the SuperNode's main loop alone.
There an empty answer is followed by a fixed pause of 3 s, which each wave of messages to the sites has to
wait out. Here the pause is short after a message and grows with the time without one, up to Flower's own. It
decides nothing but speed: with a Flower whose loop is another one, Flower's own pause stays, and the log says
so.
"""

import importlib
import inspect
import logging
import time
from types import ModuleType
from typing import Any

log = logging.getLogger("fedbags.supernode")

SHORTEST = 0.5
"""Seconds between two questions right after a message. Each question costs the SuperLink some 14 ms of a
core: too much for many sites to ask so often for long, so ``SHARE`` lets the pause grow."""

SHARE = 0.1
"""The pause as a share of the time that was waited since the last message: a site loses no more of it."""

FLOWERS_PAUSE = 3
FLOWERS_LOOP = """
            # No message has been pulled therefore we can skip the push stage.
            if run_id is None:
                # If no message was received, wait for a while
                time.sleep(3)
                continue
"""
"""The place, as it is in Flower 1.41.0 and 1.42.0; nothing else in its module sleeps as long."""


class Time:
    """Replace the module ``time`` in Flower's main loop, with one pause changed and the rest as it was."""

    def __init__(self) -> None:
        self._waited = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep, for less long where the loop asks for its pause without a message."""
        if seconds == FLOWERS_PAUSE:
            seconds = min(max(SHORTEST, SHARE * self._waited), FLOWERS_PAUSE)
            self._waited += seconds
        # The module's other pauses wait for the app's reply, so a message has come.
        else:
            self._waited = 0.0
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def shorten_pause(flower: ModuleType) -> bool:
    """Shorten the pause in the module of Flower's main loop.

    Returns:
        False, with nothing done, if that is another loop than the one known here.
    """
    try:
        source = inspect.getsource(flower)
    except (OSError, TypeError):
        return False
    # The pause is recognised by its length alone, so nothing else in the module may sleep as long.
    known = FLOWERS_LOOP in source and source.count(f"time.sleep({FLOWERS_PAUSE})") == 1
    # Set in this one module: the library's own ``time`` stays as it is for everybody else.
    if known and getattr(flower, "time", None) is time:
        flower.time = Time()  # type: ignore[attr-defined]
        return True
    return False


def main() -> None:
    """Run Flower's SuperNode with the arguments of this process.

    Raises:
        SystemExit: it ended; the status is Flower's.
    """
    from flwr.supernode.cli import flower_supernode

    if not shorten_pause(importlib.import_module("flwr.supernode.start_client_internal")):
        log.warning(
            "this version of Flower waits for messages in another way than fedbags knows: its own pause "
            "stays, and rounds take some seconds longer"
        )
    flower_supernode()


if __name__ == "__main__":
    main()
