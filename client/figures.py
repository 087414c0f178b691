"""Define the full name, type, exact length and range of every metric of a reply.

A metric's name is one of a fixed list and its value is compared with the site's hierarchy and bags, so that
neither can carry anything else. Knows nothing of records and of who may see which metric.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from common.errors import EgressError
from common.privacy.proportions import GRID
from common.records import SMALLEST_CELL, SUPPRESSED, Metric

if TYPE_CHECKING:
    from client.egress import Facts

ROUNDING = 1e-3
"""How far float32 may leave the range of a mean."""
FARTHEST_NOISE = 200
"""Discrete Laplace noise of this many scales has a chance below 1e-86."""

Check = Callable[[Metric], bool]


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


def check_metrics(facts: "Facts", metrics: Mapping[str, Metric]) -> None:
    """Refuse metrics that differ from those that this reply may hold.

    A reply to an evaluation may also hold none at all.

    Raises:
        EgressError: a metric is missing, too many, or not of its type, length or range.
    """
    expected = _expected(facts)
    # All or, at an evaluation, none: a site may hold no bags back and have no test images. Anything in
    # between would be a choice that could tell something.
    if metrics.keys() != expected.keys() and (metrics or not facts.kind.startswith("evaluate.")):
        raise EgressError("a metric that the site's policy does not allow, or one too few")
    for name, value in metrics.items():
        if not expected[name](value):
            raise EgressError(f"metric {name!r} is not of its type, length or range")


def _expected(facts: "Facts") -> dict[str, Check]:
    """Return the check of each metric that the reply may hold, by full name."""
    allowed = facts.allowed_metrics()
    known: dict[str, Check] = {}
    if facts.kind in ("train", "train.masked"):
        images = int(facts.store.bag_sizes.sum()) * facts.config.train.local_epochs
        known = {
            "num-bags": _exactly(facts.training),
            "num-images": lambda value: _in_range(value, images),
            "loss": lambda value: type(value) is float and math.isfinite(value),
        }
    elif facts.kind == "evaluate.bags":
        levels = len(facts.store.hierarchy.levels)
        # Noise is unbounded, but FARTHEST_NOISE scales never occur in practice. Without a bound, a
        # handler could send any number as a noised sum.
        farthest = GRID * (facts.held_back + FARTHEST_NOISE * facts.config.dp.metrics_scale)
        known = {
            "bags-kl": _floats(levels, math.inf),
            "bags-l1": _floats(levels, 2.0),
            "held-back-bags": _exactly(facts.held_back),
            "noised-bags-tv": lambda value: (
                isinstance(value, tuple)
                and len(value) == levels
                and all(_is_int(v) and abs(v) <= farthest for v in value)
                and facts.charges.paid_for_look(facts.asked.round, facts.config, levels)
            ),
        }
    elif facts.kind == "evaluate.test":
        smallest = facts.terms.minimum_cell_size
        for reading in ("argmax", "path"):
            for level, size in enumerate(facts.store.hierarchy.sizes):
                known[f"confusion.{reading}.{level}"] = _cells(size, smallest)
        if smallest > 1:
            known[SMALLEST_CELL] = _exactly(smallest)
    return {name: check for name, check in known.items() if name.partition(".")[0] in allowed}


def _is_int(value: object) -> bool:
    return type(value) is int  # neither a truth value nor a number of NumPy


def _in_range(value: Metric, most: int) -> bool:
    return isinstance(value, int) and _is_int(value) and 0 <= value <= most


def _exactly(number: int) -> Check:
    return lambda value: _is_int(value) and value == number


def _floats(length: int, most: float) -> Check:
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == length
        and all(type(v) is float and math.isfinite(v) and -ROUNDING <= v <= most + ROUNDING for v in value)
    )


def _cells(size: int, smallest: int) -> Check:
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == size * size
        and all(_is_int(v) and (v == 0 or v >= max(smallest, 1) or _suppressed(v, smallest)) for v in value)
    )


def _suppressed(value: int | float, smallest: int) -> bool:
    # A site that suppresses nothing has no use for the mark of a suppressed count.
    return value == SUPPRESSED and smallest > 1
