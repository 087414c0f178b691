"""Turn the sites' evaluation counts into figures.

Figures on held-back bags use no labels of single images; figures on test images do. Sites send sums and
confusion counts, never images or labels of single images; here they are added up. Each figure is as
torchmetrics computes it (the tests compare).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.hierarchy import Hierarchy
from common.privacy.proportions import GRID
from common.records import SMALLEST_CELL, SUPPRESSED, MessageError, ModelUpdate
from common.run_records import BagFigures, LevelFigures, Suppression
from server.exchange import LARGEST_FIGURE

Confusion = list[NDArray[np.int64]]
"""One (C_l, C_l) array of counts per level, rows the true class."""


def check_figures(update: ModelUpdate, hierarchy: Hierarchy, bags: int) -> None:
    """Check the figures of one site, so that none can spoil those of the others.

    Args:
        update: the site's reply to an evaluation; a figure that it lacks is no fault.
        hierarchy: the federation's.
        bags: the number that the site states in its release.

    Raises:
        MessageError: a figure has another shape than the hierarchy's, or cannot be.
    """
    levels, metrics = len(hierarchy.levels), update.metrics
    # This count is the site's weight in the pooled figures, so it is bounded by the bags of its release.
    held_back = metrics.get("held-back-bags", 1)
    if not isinstance(held_back, int) or not 0 < held_back <= bags:
        raise MessageError(f"metric 'held-back-bags' must be a count of at most {bags} bags")
    for name, largest in (("bags-kl", LARGEST_FIGURE), ("bags-l1", 2.0 + 1e-6), ("noised-bags-tv", None)):
        if name not in metrics:
            continue
        values, smallest = np.atleast_1d(metrics[name]), 0.0
        if largest is None:  # with noise it may be negative
            largest, smallest = LARGEST_FIGURE, -LARGEST_FIGURE
        if values.shape != (levels,) or not ((values >= smallest) & (values <= largest)).all():
            raise MessageError(
                f"metric {name!r} must be {levels} figure(s) between {smallest:g} and {largest:g}"
            )
    for decoder in ("argmax", "path"):
        for level, size in enumerate(hierarchy.sizes):
            name = f"confusion.{decoder}.{level}"
            counts = np.atleast_1d(metrics.get(name, 0))
            if name in metrics and counts.shape != (size * size,):
                raise MessageError(f"metric {name!r} must be {size} times {size} counts")
            # Only a site that says that it suppresses small counts may send the mark for them.
            lowest = SUPPRESSED if smallest_cell(update) > 1 else 0
            if counts.dtype.kind != "i" or counts.min() < lowest or counts.max() > LARGEST_FIGURE:
                raise MessageError(f"metric {name!r} must be counts between 0 and {LARGEST_FIGURE:g}")


def pooled_bag_figures(updates: Sequence[ModelUpdate], hierarchy: Hierarchy) -> list[BagFigures] | None:
    """Return mean KL and L1 per level over all held-back bags of all sites that sent theirs.

    Returns:
        One per level, with ``l1`` not set where no site sends it; None when no site sent any KL.
    """
    means = {key: _pooled(updates, f"bags-{key}") for key in ("kl", "l1")}
    sent = {key: mean for key, mean in means.items() if mean is not None}
    if "kl" not in sent:
        return None
    return [
        BagFigures(level=name, **{key: float(mean[level]) for key, mean in sent.items()})
        for level, name in enumerate(hierarchy.levels)
    ]


def _pooled(updates: Sequence[ModelUpdate], metric: str) -> NDArray[np.float64] | None:
    """Return the mean of a metric over the sites' held-back bags, shape (levels,), or None."""
    values, weights = [], []
    for update in updates:
        # The figures are those that check_figures let pass.
        if {metric, "held-back-bags"} <= update.metrics.keys():
            values.append(np.atleast_1d(update.metrics[metric]))
            weights.append(update.metrics["held-back-bags"])
    if not values:
        return None
    return np.asarray(np.average(values, axis=0, weights=np.array(weights, dtype=np.float64)))


def noised_bag_figures(updates: Sequence[ModelUpdate], hierarchy: Hierarchy) -> list[BagFigures] | None:
    """Return the mean L1 per level of a private run, from noised sums and the number of held-back bags.

    That number is public.

    Returns:
        One per level, with ``l1`` alone: an unbiased estimate of the mean L1, outside [0, 2] where the
        noise is larger; None when no site sent any.
    """
    sums, bags = np.zeros(len(hierarchy.levels)), 0
    for update in updates:
        sent, held_back = update.metrics.get("noised-bags-tv"), update.metrics.get("held-back-bags")
        if (
            isinstance(sent, tuple)
            and len(sent) == len(sums)
            and isinstance(held_back, int)
            and held_back > 0
        ):
            sums, bags = sums + np.array(sent, dtype=np.float64), bags + held_back
    if not bags:
        return None
    return [
        BagFigures(level=name, l1=float(2 * total / GRID / bags))
        for name, total in zip(hierarchy.levels, sums, strict=True)
    ]


def selection_score(bags: Sequence[BagFigures]) -> float:
    """Return the score that model selection minimises, from bags only.

    It is the KL summed over the levels (nats), or in a private run the noised L1.
    """
    # A private run has no KL, because one bag can move it without bound.
    return float(sum((level.l1 or 0.0) if level.kl is None else level.kl for level in bags))


def confusions(update: ModelUpdate, hierarchy: Hierarchy, decoder: str) -> Confusion | None:
    """Return a site's confusion counts, or None when it sent none.

    Args:
        update: the site's reply to the test.
        hierarchy: the label tree.
        decoder: ``argmax`` (each level by itself) or ``path`` (the best root-to-leaf path).

    Returns:
        None too when the counts of a level are missing or of a wrong length.
    """
    matrices = []
    for level, size in enumerate(hierarchy.sizes):
        flat = update.metrics.get(f"confusion.{decoder}.{level}")
        if flat is None or not isinstance(flat, tuple) or len(flat) != size * size:
            return None
        matrices.append(np.array(flat, dtype=np.int64).reshape(size, size))
    return matrices


def shown(confusion: Confusion) -> Confusion:
    """Return the counts with 0 for those that a site suppressed."""
    return [np.maximum(level, 0) for level in confusion]


def accuracy_bounds(
    hierarchy: Hierarchy, counts: Sequence[tuple[Confusion, Confusion]], smallest: Sequence[int]
) -> list[Suppression | None]:
    """Return the bounds on the accuracies where sites suppressed small counts.

    Args:
        hierarchy: the label tree.
        counts: the (argmax, path) counts of each site, suppressed ones as ``SUPPRESSED``.
        smallest: the least count that each of these sites shows.

    Returns:
        Per level None where nothing is suppressed.
    """
    found: list[Suppression | None] = []
    for level in range(len(hierarchy.levels)):
        cells, below = 0, 0
        bounds: dict[str, tuple[float, float]] = {}
        for reading, name in enumerate(("accuracy", "consistent_accuracy")):
            low, high = np.zeros(2), np.zeros(2)  # images on the diagonal, and off it
            for pair, limit in zip(counts, smallest, strict=True):
                matrix = pair[reading][level]
                hidden, right = matrix == SUPPRESSED, np.eye(len(matrix), dtype=bool)
                if hidden.any():
                    cells, below = cells + int(hidden.sum()), max(below, limit)
                for place, side in enumerate((right, ~right)):
                    seen, unseen = matrix[side & ~hidden].sum(), int((side & hidden).sum())
                    low[place] += seen + unseen
                    high[place] += seen + unseen * max(limit - 1, 1)
            bounds[name] = (
                float(low[0] / max(low[0] + high[1], 1)),
                float(high[0] / max(high[0] + low[1], 1)),
            )
        found.append(Suppression(cells=cells, below=below, **bounds) if cells else None)
    return found


def smallest_cell(update: ModelUpdate) -> int:
    """Return the least count of test images that the site shows, 1 where it shows all."""
    value = update.metrics.get(SMALLEST_CELL, 1)
    return value if isinstance(value, int) and 1 <= value <= 1000 else 1


def add_up(pairs: Sequence[tuple[Confusion, Confusion]]) -> tuple[Confusion, Confusion]:
    """Sum the (argmax, path) counts over sites, level by level."""
    argmax, path = zip(*pairs, strict=True)
    return _sum(argmax), _sum(path)


def _sum(matrices: Sequence[Confusion]) -> Confusion:
    return [np.sum(level, axis=0) for level in zip(*matrices, strict=True)]


def level_figures(
    hierarchy: Hierarchy,
    argmax: Confusion,
    path: Confusion,
    bounds: Sequence[Suppression | None] | None = None,
) -> list[LevelFigures]:
    """Return the accuracies and macro-F1 per level, from the argmax and the consistent path.

    They are accuracy, balanced accuracy and macro-F1 of each level by itself, and the accuracy of the
    consistent path. Balanced accuracy is the mean recall of the classes that have test images; macro-F1
    averages over the classes that occur in the test or among the predictions (torchmetrics' rule).

    Args:
        hierarchy: the label tree.
        argmax: counts of each level by itself; suppressed ones are left out.
        path: counts of the best root-to-leaf path.
        bounds: of ``accuracy_bounds``; of a level of which counts are suppressed, the true figures lie
            between these.
    """
    figures = []
    for level, name in enumerate(hierarchy.levels):
        bound = bounds[level] if bounds is not None else None
        figures.append(
            LevelFigures(
                name=name,
                classes=hierarchy.sizes[level],
                images=int(argmax[level].sum()),
                accuracy=_share_right(argmax[level]),
                balanced_accuracy=_balanced_accuracy(argmax[level]),
                macro_f1=_macro_f1(argmax[level]),
                consistent_accuracy=_share_right(path[level]),
                **({"suppressed": bound} if bound is not None else {}),
            )
        )
    return figures


def _balanced_accuracy(confusion: NDArray[np.int64]) -> float:
    right, true = _counts(confusion.diagonal()), _counts(confusion.sum(axis=1))
    return float((right / true)[true > 0].mean()) if true.any() else 0.0


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    """Return the mean of F1 = 2 TP / (2 TP + FN + FP) over the classes that occur."""
    right = _counts(2 * confusion.diagonal())
    occurs = _counts(confusion.sum(axis=0) + confusion.sum(axis=1))
    score = torch.where(occurs > 0, right / occurs, 0.0)
    return float((score / (occurs > 0).sum()).sum()) if occurs.any() else 0.0


def _counts(counts: NDArray[np.int64]) -> torch.Tensor:
    """Return counts as torchmetrics computes with them, float32."""
    # torchmetrics itself reads one pair per image: a count that a site made up would ask for any amount of
    # memory.
    return torch.from_numpy(counts.astype(np.float32))


def _share_right(confusion: NDArray[np.int64]) -> float:
    return float(np.trace(confusion) / max(confusion.sum(), 1))
