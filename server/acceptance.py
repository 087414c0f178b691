"""Check the parts of a site's reply before they are used.

The sender, the round, the shapes of arrays and the range of every value are checked, one reply at a time.
rounds.py decides on the consequence of a refusal. The checks stop the accidents and the crude attacks (NaN,
infinity, absurd values, other shapes, another site's name, an update sent before, texts of megabytes), and
whatever else goes wrong while a reply is read is the fault of the site that sent it. Sites that lie within
these bounds are left to the robust strategies (aggregation.py).
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from common.config_tables import FederationConfig
from common.errors import RunError
from common.hierarchy import Hierarchy
from common.records import FloatArray, MessageError, ModelUpdate, PrivacyStatement, ProportionRelease
from common.run_records import Cause
from common.text import one_line
from common.wire import check_only, from_records

log = logging.getLogger("fedbags.server")

_Arrays = Mapping[str, FloatArray]

_MOST_BAGS = 10**6
"""As a release can say."""
LARGEST_FIGURE = 1e12
"""Beyond every count and figure of a hospital, and far from where sums overflow."""


class _UnreadableReply(MessageError):  # noqa: N818 (named for what came)
    """Report a reply that is not what its sender was asked for."""


def cause_of(error: MessageError) -> Cause:
    """Return the cause of leaving out a reply for this error."""
    return Cause.UNREADABLE if isinstance(error, _UnreadableReply) else Cause.UNUSABLE


@contextmanager
def reading(what: str) -> Iterator[None]:
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
    with reading("unreadable release"):
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
    with reading("unreadable reply"):
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
