"""Flower's SuperNode, which asks the coordinator for messages more often than it does by itself.

The supervisor starts it in place of ``flower-supernode``, with the same arguments::

    python -P -m deploy.consortium.supernode ARGUMENTS

One name in Flower is replaced and nothing else: the module ``time``, in the SuperNode's main loop alone.
There an empty answer is followed by a fixed pause of 3 s, and each wave of messages to the sites waits for
its end. The pause decides nothing but speed: with a Flower whose loop is another one, Flower's own pause
stays, and the log says so.
"""

import importlib
import inspect
import logging
import time
from types import ModuleType
from typing import Any

log = logging.getLogger("fedbags.supernode")

PAUSE = 0.5
"""Seconds between two empty answers. Two small requests a second at the coordinator for each site that has no
work, in place of one in three seconds."""

FLOWERS_PAUSE = 3
FLOWERS_LOOP = """
            # No message has been pulled therefore we can skip the push stage.
            if run_id is None:
                # If no message was received, wait for a while
                time.sleep(3)
                continue
"""
"""The place, as it is in Flower 1.41.0 and 1.42.0; nothing else in its module may sleep as long."""


class Time:
    """Stands in for the module ``time``: the one pause is shorter, everything else is as it was."""

    def sleep(self, seconds: float) -> None:
        """Sleep, less long for Flower's pause."""
        time.sleep(PAUSE if seconds == FLOWERS_PAUSE else seconds)

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
    known = FLOWERS_LOOP in source and source.count(f"time.sleep({FLOWERS_PAUSE})") == 1
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
