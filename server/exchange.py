"""Send requests to sites and read their replies one at a time, up to a deadline.

Replies are read in the order in which the sites were asked, whatever order they arrived in: the
floating-point result of an aggregation then does not depend on who was fastest, and the server holds one
reply at a time (the others wait in the SuperLink). This module knows node ids and messages, not what they
mean.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import FedbagsError
from common.records import SITE_ERRORS, SiteError
from common.run_records import FLOWER_ERRORS, Cause, Exchanged, cause_of_code
from common.wire import size

log = logging.getLogger("fedbags.server")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


@dataclass(frozen=True)
class Reply:
    """Hold the content that came back from one node, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    cause: Cause = Cause.OTHER
    """Of the failure."""
    code: int = 0
    """The error code of the failure: one of ``SiteError``, or Flower's; 0 where there is none."""


@dataclass(frozen=True)
class Phase:
    """Say what is asked of sites at a point of a run, and how long they have.

    Attributes:
        kind: Flower's message type, such as ``train`` or ``query.proportions``.
        round: travels as the message's group.
        deadline: seconds from now; a node without a reply by then yields a failure.
    """

    kind: str
    round: int
    deadline: float


_Note = Callable[[Exchanged], None]
"""Called once all replies of an exchange are in."""


def ask(
    grid: Grid, requests: Mapping[int, RecordDict], phase: Phase, note: _Note | None = None
) -> Iterator[Reply]:
    """Send one request to each node and yield one reply per node, in the order of ``requests``.

    Args:
        grid: Flower's grid, or ours.
        requests: node id to content, in the order in which replies are wanted.
        phase: what they are.
        note: called with the seconds and bytes of the exchange at its end, if anybody was asked.
    """
    started = time.monotonic()
    end = started + phase.deadline
    replies = sent = received = 0
    nodes = list(requests)
    ids = grid.push_messages(
        [
            # The message outlives the deadline by a minute, so that the deadline here decides and not
            # Flower's own expiry.
            Message(content, node, phase.kind, ttl=phase.deadline + 60.0, group_id=str(phase.round))
            for node, content in requests.items()
        ]
    )
    for node, message_id in _pair(nodes, list(ids)):
        if message_id is None:
            yield Reply(node, None, "the message could not be sent to the site", Cause.UNSENT)
            continue
        sent += size(requests[node])
        try:
            message = _wait(grid, message_id, end)
        except (FedbagsError, OSError, httpx.HTTPError):  # of the link, or of ours
            raise
        except Exception as error:  # whatever Flower raises when the bytes that a site sent are no message
            kind = type(error).__name__
            log.exception("a reply could not be unpacked: %(error)s", {"error": kind})
            yield Reply(node, None, f"unreadable reply: {kind} while it was unpacked", Cause.UNREADABLE)
            continue
        if message is None:
            yield Reply(node, None, f"no reply within {phase.deadline:g} s", Cause.DEADLINE)
        elif message.has_error():
            # A lost node's error names no sender, so the node is the one this request went to.
            code = message.error.code
            yield Reply(node, None, _error_text(code), cause_of_code(code), code)
        else:
            replies += 1
            received += size(message.content)
            yield Reply(node, message.content)
    if note is not None and nodes:
        note(
            Exchanged(
                round=phase.round,
                phase=phase.kind,
                seconds=_seconds_since(started),
                asked=len(nodes),
                replies=replies,
                bytes_sent=sent,
                bytes_received=received,
            )
        )


def _seconds_since(start: float) -> float:
    return round(time.monotonic() - start, 3)


def _error_text(code: int) -> str:
    """Return our own words for an error code."""
    # The text that came with the code is not used: it could carry a path or a patient id.
    if code in SITE_ERRORS:
        return SITE_ERRORS[SiteError(code)]
    return FLOWER_ERRORS.get(code, f"error code {code}")


def _pair(nodes: Sequence[int], ids: Sequence[str | None]) -> Iterator[tuple[int, str | None]]:
    # An oversized request makes Flower's grid return fewer ids: then nothing was sent. A node that was
    # removed since it was listed (a revoked site) gets no message and an empty id.
    sent = [message_id or None for message_id in ids]
    return zip(nodes, sent if len(sent) == len(nodes) else [None] * len(nodes), strict=True)


def _wait(grid: Grid, message_id: str, end: float) -> Message | None:
    pause = _FIRST_PAUSE
    while True:
        # One id at a time: a pull of all would hold every reply in memory at once.
        for message in grid.pull_messages([message_id]):
            return message
        left = end - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
