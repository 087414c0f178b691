"""Ask sites something and read their replies one at a time, up to a deadline.

Replies are read in the order in which the sites were asked, whatever order they arrived in: the
floating-point result of an aggregation then does not depend on who was fastest, and the server holds one
reply at a time (the others wait in the SuperLink). Knows node ids and messages, not what they mean.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


@dataclass(frozen=True)
class Reply:
    """What came back from one node: content, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    code: int = 0
    """The error code of the failure: one of ``SiteError``, or Flower's; 0 where there is none."""


def ask(
    grid: Grid, requests: Mapping[int, RecordDict], message_type: str, *, round: int, deadline: float
) -> Iterator[Reply]:
    """Send one request to each node and yield one reply per node, in the order of ``requests``.

    Args:
        grid: Flower's grid, or ours.
        requests: node id to content, in the order in which replies are wanted.
        message_type: Flower message type, such as ``train`` or ``query.proportions``.
        round: travels as the message's group.
        deadline: seconds from now; a node without a reply by then yields a failure.
    """
    end = time.monotonic() + deadline
    nodes = list(requests)
    ids = grid.push_messages(
        [
            Message(content, node, message_type, ttl=deadline + 60.0, group_id=str(round))
            for node, content in requests.items()
        ]
    )
    for node, message_id in _pair(nodes, list(ids)):
        if message_id is None:
            yield Reply(node, None, "the message could not be sent to the site")
            continue
        message = _wait(grid, message_id, end)
        if message is None:
            yield Reply(node, None, f"no reply within {deadline:g} s")
        elif message.has_error():
            # A lost node's error names no sender, so the node is the one this request went to.
            reason = message.error.reason or f"error code {message.error.code}"
            yield Reply(node, None, reason, message.error.code)
        else:
            yield Reply(node, message.content)


def _pair(nodes: Sequence[int], ids: Sequence[str | None]) -> Iterator[tuple[int, str | None]]:
    # An oversized request makes Flower's grid return fewer ids: then nothing was sent.
    return zip(nodes, ids if len(ids) == len(nodes) else [None] * len(nodes), strict=True)


def _wait(grid: Grid, message_id: str, end: float) -> Message | None:
    pause = _FIRST_PAUSE
    while True:
        for message in grid.pull_messages([message_id]):
            return message
        left = end - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
