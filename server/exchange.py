"""Send requests to sites, read their replies one at a time up to a deadline, and check what they say.

Replies are read in the order in which the sites were asked, whatever order they arrived in: the
floating-point result of an aggregation then does not depend on who was fastest, and the server holds one
reply at a time (the others wait in the SuperLink).

The sender, the round, the shapes of arrays and the range of every value are checked, one reply at a time.
rounds.py decides on the consequence of a refusal. The checks stop the accidents and the crude attacks (NaN,
infinity, absurd values, other shapes, another site's name, an update sent before, texts of megabytes), and
whatever else goes wrong while a reply is read is the fault of the site that sent it. Sites that lie within
these bounds are left to the robust strategies (aggregation.py).
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.config_tables import FederationConfig
from common.errors import FedbagsError, RunError
from common.hierarchy import Hierarchy
from common.records import (
    SITE_ERRORS,
    FloatArray,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    SiteError,
)
from common.run_records import FLOWER_ERRORS, Cause, Exchanged, cause_of_code
from common.text import one_line
from common.wire import check_only, from_records, size

log = logging.getLogger("fedbags.server")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0

_Note = Callable[[Exchanged], None]
"""Called once all replies of an exchange are in."""
_Arrays = Mapping[str, FloatArray]
_MOST_BAGS = 10**6
"""Most bags that a release can state."""
LARGEST_FIGURE = 1e12
"""Beyond every count and figure of a hospital, and far from where sums overflow."""


@dataclass(frozen=True)
class Reply:
    """Hold the content that came back from one node, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    cause: Cause = Cause.OTHER
    """Cause of the failure."""
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


class _UnreadableReply(MessageError):  # noqa: N818 (named for what came)
    """Report a reply that is not what its sender was asked for."""


def cause_of(error: MessageError) -> Cause:
    """Return the cause of leaving out a reply for this error."""
    return Cause.UNREADABLE if isinstance(error, _UnreadableReply) else Cause.UNUSABLE


@contextmanager
def reading_reply(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while a site's reply is read into that site's fault.

    Args:
        what: the beginning of the reason, such as ``unreadable reply``.

    Raises:
        UnreadableReply: the reason, on one line of at most ``REASON_CHARACTERS`` characters.
    """
    try:
        yield
    except (MessageError, RunError) as error:
        raise _UnreadableReply(one_line(f"{what}: {error}")) from None
    except Exception as error:
        kind = type(error).__name__
        # An exception that nobody expected may be a fault of ours: its class and its place are logged, not
        # its text, which the site may have chosen.
        place = RuntimeError(kind).with_traceback(error.__traceback__)
        log.error("reading a reply failed with %(error)s", {"error": kind}, exc_info=place)
        raise _UnreadableReply(f"{what}: {kind} while it was read") from None


def read_release(content: RecordDict) -> tuple[ProportionRelease, Hierarchy]:
    """Read a site's release, and the label tree in it.

    Raises:
        MessageError: a record is missing, malformed or too many, or its content is not that of a release.
    """
    with reading_reply("unreadable release"):
        check_only(content, ProportionRelease)
        release = from_records(content, ProportionRelease)
        tree = release.tree()
        # Reading a tree strips its names, so the release could otherwise name classes in a form that its
        # tree does not have.
        if tree.to_dict() != release.hierarchy:
            raise MessageError("its label tree is not written as Hierarchy.to_dict() writes it")
    return release, tree


def read_update(
    content: RecordDict, site: str, round: int, *, private: bool
) -> tuple[ModelUpdate, PrivacyStatement | None]:
    """Read a reply that ``site`` was asked for in ``round``.

    Args:
        content: what came back.
        site: the name of the node that was asked.
        round: the round that it was asked for; a late reply to an earlier one is refused.
        private: a privacy statement comes with the update.

    Raises:
        MessageError: a record is missing, malformed or too many, or speaks for another site or round.
    """
    with reading_reply("unreadable reply"):
        check_only(content, ModelUpdate, *([PrivacyStatement] if private else []))
        update = from_records(content, ModelUpdate)
        statement = from_records(content, PrivacyStatement) if private else None
    if update.sender != site or update.round != round:
        raise MessageError(one_line(f"reply of {update.sender!r} for round {update.round}"))
    if statement is not None:
        check_statement(statement, site, round)
    return update, statement


def check_statement(statement: PrivacyStatement, site: str, round: int) -> None:
    """Check a privacy statement that ``site`` was asked for in ``round``.

    Raises:
        MessageError: it speaks for another site or round.
    """
    if statement.site != site or statement.round != round:
        raise MessageError(one_line(f"privacy statement of {statement.site!r} for round {statement.round}"))


def fault_of(
    update: ModelUpdate, reference: _Arrays, config: FederationConfig, bags: int = _MOST_BAGS
) -> str:
    """Return the reason why an update cannot be used, or an empty text.

    Args:
        update: what a site sent.
        reference: the trainable arrays of the current model; names and shapes must match.
        config: ``max_update_mb``, largest total size, MiB; ``max_change``, largest L2 norm of the change
            relative to 1 + the norm of the model.
        bags: that the site has by its own release; its update may weigh no more.
    """
    if update.megabytes > config.max_update_mb:
        return f"oversized update: {update.megabytes:.1f} MiB, at most {config.max_update_mb:g} allowed"
    if update.arrays.keys() != reference.keys():
        odd = sorted(update.arrays.keys() ^ reference.keys())
        return f"array names differ from the model's: {odd[:5]}"
    for name, array in update.arrays.items():
        if array.shape != reference[name].shape:
            return f"array {name!r} has shape {array.shape}, {reference[name].shape} expected"
        if not np.isfinite(array).all():
            return f"array {name!r} holds NaN or infinity"
    weight = update.metrics.get("num-bags")
    if not isinstance(weight, int) or weight < 1:
        return "metric 'num-bags' must be a positive integer"
    # A site could otherwise claim any weight and make the mean its own.
    if weight > bags:
        return f"metric 'num-bags' must be at most {bags}, the bags that the site released"
    if (loss := update.metrics.get("loss")) is not None and usable_loss(loss) is None:
        return f"metric 'loss' must be one number of at most {LARGEST_FIGURE:g}"
    change = _norm(
        np.subtract(update.arrays[name], array, dtype=np.float64) for name, array in reference.items()
    )
    # Relative to the model's norm, so that one bound serves small and large models; the 1 keeps it above
    # zero for a model of zeros.
    limit = config.max_change * (1.0 + _norm(reference.values()))
    if change > limit:
        return f"the model would change by {change:.3g} (L2 norm), at most {limit:.3g} allowed (max-change)"
    return ""


def usable_loss(loss: object) -> float | None:
    """Return a loss that may be averaged with those of other sites, or None."""
    return float(loss) if isinstance(loss, int | float) and abs(loss) <= LARGEST_FIGURE else None


def is_replay(update: ModelUpdate, sent: _Arrays, seen: dict[str, list[str]]) -> bool:
    """Return True if the site sent these very arrays in an earlier round.

    The digest of the arrays is added to ``seen[site]``. Honest training never sends the same arrays twice,
    for every round starts from another model.

    Args:
        update: from a site; its arrays have the names and shapes of the model's.
        sent: at least those arrays, as the site was sent them.
        seen: digests of the arrays that each site sent.
    """
    # A site whose gradient is zero gives back the model that it was sent, which is no replay.
    if all(np.array_equal(array, sent[name]) for name, array in update.arrays.items()):
        return False
    digest = hashlib.sha256()
    for name in sorted(update.arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(update.arrays[name]).data)
    short = digest.hexdigest()[:32]
    before = seen.setdefault(update.sender, [])
    if short in before:
        return True
    before.append(short)
    return False


def _norm(arrays: Iterable[NDArray[Any]]) -> float:
    """Return the L2 norm of all arrays together, in float64, with one array in memory at a time."""
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays))
