"""Decide which counts and figures a site's policy releases, and check the figures of a reply.

The policy releases no label counts, the site's total, or the counts of every bag. In a private run they are
noised and charged to the site's ledger; otherwise they are exact, and the record states it.

A metric's name is one of a fixed list, and its value is compared with the site's hierarchy and bags, so that
neither can carry anything else. Handlers fill a reply by these rules, and the guard checks the reply against
them. Knows nothing of how a metric is computed.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from client.data.bags import BagStore
from client.session import SiteSession
from client.site import PrivateMetrics, ReleaseProportions, Terms
from common.config import RunConfig
from common.errors import EgressError
from common.privacy.proportions import GRID
from common.records import SMALLEST_CELL, SUPPRESSED, Metric, ProportionRelease

if TYPE_CHECKING:  # the accountants are loaded in private runs only
    from common.privacy.proportions import CountRelease

_UNCOVERED_BY_DP = frozenset({"num-bags", "confusion"})
"""Metrics that may leave a private run. They are not covered by its epsilon, and the report says so: the
number of bags, and counts on labelled test images, which are never trained on."""
NOISED_SUMS = "noised-bags-tv"
_NOISED = frozenset({NOISED_SUMS, "held-back-bags"})
"""What may leave a private run of an evaluation on held-back bags, where ``private-metrics`` is "noise": sums
with noise that the ledger has paid for (common/privacy/proportions.py), and the number of bags, which is
public."""
_OF_TRAINING = frozenset({"num-bags", "num-images", "loss"})
IN_REPLY = {
    "train": _OF_TRAINING,
    "train.masked": _OF_TRAINING,
    "evaluate.bags": frozenset({"bags-kl", "bags-l1", "held-back-bags"}),
    "evaluate.test": frozenset({"confusion"}),
}
"""The metrics of each message type that has any, before noise."""
_ROUNDING = 1e-3
"""How far float32 may leave the range of a mean."""
_FARTHEST_NOISE = 200
"""Discrete Laplace noise of this many scales has a chance below 1e-86."""
_Check = Callable[[Metric], bool]


def release_proportions(store: BagStore, version: str) -> ProportionRelease:
    """Return the exact release of a data version, under the name ``version``, as the site's policy allows."""
    match store.config.policy.release_proportions:
        case ReleaseProportions.NONE:
            rows = store.leaf_counts[:0]
        case ReleaseProportions.TOTAL:
            rows = store.leaf_counts.sum(axis=0, keepdims=True)
        case ReleaseProportions.PER_BAG:
            rows = store.leaf_counts
    return _record(store, version, tuple(tuple(map(float, row)) for row in rows), "exact", {})


def private_release(store: BagStore, noised: "CountRelease", version: str) -> ProportionRelease:
    """Return the release of noised counts, with the event that they cost.

    ``version`` is the ledger's name of the data version.
    """
    rows = tuple(tuple(map(float, row)) for row in noised.counts)
    return _record(store, version, rows, "discrete-laplace", noised.event.model_dump())


def _record(
    store: BagStore,
    version: str,
    rows: tuple[tuple[float, ...], ...],
    mechanism: str,
    event: dict[str, float | str],
) -> ProportionRelease:
    policy = store.config.policy.release_proportions
    # Counts per bag tell the sizes of the bags anyway; with less released, the sizes stay here.
    sizes = tuple(store.bag_sizes.tolist()) if policy is ReleaseProportions.PER_BAG else ()
    return ProportionRelease.model_validate(
        {
            "site": store.name,
            "data_version": version,
            "hierarchy": store.hierarchy.to_dict(),
            "granularity": policy.value,
            "leaf_counts": rows,
            "bags": len(store),
            "bag_sizes": sizes,
            "mechanism": mechanism if rows else "none",
            "event": event,
        }
    )


def may_leave(kind: str, config: RunConfig, store: BagStore, terms: Terms) -> frozenset[str]:
    """Return the names of the metrics that a reply may hold.

    Args:
        kind: the message type.
        config: the run.
        store: the site's bags, with its policy.
        terms: what holds at this node.
    """
    site = store.config
    training, held_back = map(len, store.split(config.train.held_back, config.seed))
    found = IN_REPLY.get(kind, frozenset())
    in_clear = frozenset(site.policy.secure_aggregation.metrics)
    if config.dp.epsilon:
        if kind == "evaluate.bags":
            return _NOISED if site.policy.private_metrics is PrivateMetrics.NOISE else frozenset()
        # A loss is computed from private data and no epsilon covers it, so a policy that names it does
        # not help.
        found &= terms.metrics & _UNCOVERED_BY_DP
        return found & in_clear if kind == "train.masked" else found
    found &= terms.metrics
    if kind == "train.masked":
        found &= in_clear
    released = site.policy.release_proportions is ReleaseProportions.PER_BAG
    # A site that releases counts per bag has given away what these figures could tell; a simulated one
    # has no patients.
    if not terms.strict or released:
        return found
    if kind == "evaluate.bags":
        masked = config.secure_aggregation.enabled or site.policy.secure_aggregation.required
        # In clear, figures of a model that the server chose would tell what the masks hide.
        found &= in_clear if masked else found
        # An exact mean over one bag is that bag's figure: a server that sends chosen models reads its
        # counts off it.
        return found if held_back >= terms.minimum_held_back_bags else frozenset()
    # Rounds that see a part of the bags each: the differences of their figures would tell of few bags.
    if config.train.rounds_per_pass > 1:
        found -= {"loss", "num-images"}
    return found if training >= terms.minimum_held_back_bags else found - {"loss"}


def suppress(metrics: Mapping[str, Metric], smallest: int) -> dict[str, Metric]:
    """Return confusion counts without those that are above 0 and below ``smallest``.

    Args:
        metrics: of ``client.evaluation.evaluate_labelled``.
        smallest: least count that is shown; 0 and 1 show all of them.
    """
    if smallest <= 1 or not metrics:
        return dict(metrics)
    shown: dict[str, Metric] = {
        name: tuple(int(SUPPRESSED if 0 < count < smallest else count) for count in counts)
        for name, counts in metrics.items()
        if isinstance(counts, tuple)
    }
    # The server must know the threshold: a suppressed count is anything from 1 to one below it.
    return {**shown, SMALLEST_CELL: smallest}


def check_metrics(kind: str, session: SiteSession, metrics: Mapping[str, Metric]) -> None:
    """Refuse metrics that differ from those that this reply may hold.

    A reply to an evaluation may also hold none at all.

    Raises:
        EgressError: a metric is missing, too many, or not of its type, length or range.
    """
    expected = _expected(kind, session)
    # All or, at an evaluation, none: a site may hold no bags back and have no test images. Anything in
    # between would be a choice that could tell something.
    if metrics.keys() != expected.keys() and (metrics or not kind.startswith("evaluate.")):
        raise EgressError("a metric that the site's policy does not allow, or one too few")
    for name, value in metrics.items():
        if not expected[name](value):
            raise EgressError(f"metric {name!r} is not of its type, length or range")


def _expected(kind: str, session: SiteSession) -> dict[str, _Check]:
    """Return the check of each metric that the reply may hold, by full name."""
    store, config = session.store, session.config
    allowed = may_leave(kind, config, store, session.terms)
    known: dict[str, _Check] = {}
    if kind in ("train", "train.masked"):
        images = int(store.bag_sizes.sum()) * config.train.local_epochs
        known = {
            "num-bags": _exactly(session.training),
            "num-images": lambda value: _in_range(value, images),
            "loss": lambda value: type(value) is float and math.isfinite(value),
        }
    elif kind == "evaluate.bags":
        levels = len(store.hierarchy.levels)
        # Noise is unbounded, but _FARTHEST_NOISE scales never occur in practice. Without a bound, a
        # handler could send any number as a noised sum.
        farthest = GRID * (session.held_back + _FARTHEST_NOISE * config.dp.metrics_scale)
        known = {
            "bags-kl": _floats(levels, math.inf),
            "bags-l1": _floats(levels, 2.0),
            "held-back-bags": _exactly(session.held_back),
            NOISED_SUMS: lambda value: (
                isinstance(value, tuple)
                and len(value) == levels
                and all(_is_int(v) and abs(v) <= farthest for v in value)
            ),
        }
    elif kind == "evaluate.test":
        smallest = session.terms.minimum_cell_size
        for reading in ("argmax", "path"):
            for level, size in enumerate(store.hierarchy.sizes):
                known[f"confusion.{reading}.{level}"] = _cells(size, smallest)
        if smallest > 1:
            known[SMALLEST_CELL] = _exactly(smallest)
    return {name: check for name, check in known.items() if name.partition(".")[0] in allowed}


def _is_int(value: object) -> bool:
    return type(value) is int  # neither a truth value nor a number of NumPy


def _in_range(value: Metric, most: int) -> bool:
    return isinstance(value, int) and _is_int(value) and 0 <= value <= most


def _exactly(number: int) -> _Check:
    return lambda value: _is_int(value) and value == number


def _floats(length: int, most: float) -> _Check:
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == length
        and all(type(v) is float and math.isfinite(v) and -_ROUNDING <= v <= most + _ROUNDING for v in value)
    )


def _cells(size: int, smallest: int) -> _Check:
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == size * size
        and all(_is_int(v) and (v == 0 or v >= max(smallest, 1) or _suppressed(v, smallest)) for v in value)
    )


def _suppressed(value: int | float, smallest: int) -> bool:
    # A site that suppresses nothing has no use for the mark of a suppressed count.
    return value == SUPPRESSED and smallest > 1
