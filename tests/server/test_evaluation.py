"""Figures of counts that sites suppressed: between which bounds they lie, and what is never made up."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.release import suppress
from common.hierarchy import Hierarchy
from common.records import Metric, ModelUpdate
from common.run_records import BagFigures, Suppression
from server.evaluation import (
    Confusion,
    accuracy_bounds,
    add_up,
    confusions,
    level_figures,
    pooled_bag_figures,
    selection_score,
    shown,
    smallest_cell,
)

TREE = Hierarchy.from_rows(["leaf"], [["a"], ["b"]])
SIZES = (2, 3)
DEEP = Hierarchy.from_rows(["kind", "leaf"], [["a", "1"], ["a", "2"], ["b", "3"]])
READINGS = {"argmax": "accuracy", "path": "consistent_accuracy"}


def one(counts: list[list[int]]) -> Confusion:
    return [np.array(counts)]


def test_bounds_by_hand() -> None:
    """One site hides counts of 1 to 4, another counts of 1 and 2, a third none."""
    counts = [
        (one([[6, -1], [-1, 10]]), one([[-1, 7], [0, 9]])),
        (one([[-1, 3], [0, 5]]), one([[4, 3], [0, 5]])),
        (one([[1, 2], [0, 3]]), one([[1, 2], [0, 3]])),
    ]
    (found,) = accuracy_bounds(TREE, counts, [5, 3, 1])
    assert found is not None
    assert (found.cells, found.below) == (4, 5)
    # Shown 25 right and 5 wrong; hidden are 1 to 2 right ones, and twice 1 to 4 wrong ones.
    assert found.accuracy == pytest.approx([26 / (26 + 13), 27 / (27 + 7)])
    # Shown 22 right and 12 wrong; hidden are 1 to 4 right ones.
    assert found.consistent_accuracy == pytest.approx([23 / (23 + 12), 26 / (26 + 12)])
    (alone,) = accuracy_bounds(TREE, counts[1:2], [3])
    assert alone is not None
    assert (alone.cells, alone.below) == (1, 3)
    assert accuracy_bounds(TREE, counts[2:], [1]) == [None]
    assert accuracy_bounds(TREE, [], []) == [None]


def test_a_site_that_shows_no_count_at_all_leaves_everything_open() -> None:
    hidden = one([[-1, -1], [-1, -1]])
    (found,) = accuracy_bounds(TREE, [(hidden, hidden)], [5])
    assert found == Suppression(cells=8, below=5, accuracy=(0.2, 0.8), consistent_accuracy=(0.2, 0.8))
    assert shown(hidden)[0].sum() == 0


@st.composite
def federations(draw: st.DrawFn) -> list[tuple[list[dict[str, Metric]], int]]:
    """Sites with their true counts of both readings, and the least count that each shows."""
    cells = st.integers(0, 12)
    sites = []
    for _ in range(draw(st.integers(1, 3))):
        counts: dict[str, Metric] = {
            f"confusion.{reading}.{level}": tuple(
                draw(st.lists(cells, min_size=size * size, max_size=size * size))
            )
            for reading in READINGS
            for level, size in enumerate(SIZES)
        }
        sites.append(([counts], draw(st.integers(0, 9))))
    return sites


@given(federations())
def test_the_true_accuracy_lies_within_the_bounds(
    federation: list[tuple[list[dict[str, Metric]], int]],
) -> None:
    """From what a site's guard suppresses to what the server writes into the summary."""
    true, sent, limits = [], [], []
    for (counts,), smallest in federation:
        whole = ModelUpdate(sender="a", round=1, arrays={}, metrics=counts)
        cut = ModelUpdate(sender="a", round=1, arrays={}, metrics=suppress(counts, smallest))
        true.append(read(whole))
        sent.append(read(cut))
        limits.append(smallest_cell(cut))
    bounds = accuracy_bounds(DEEP, sent, limits)
    told = level_figures(DEEP, *add_up([(shown(a), shown(p)) for a, p in sent]), bounds)
    for level, exact in enumerate(level_figures(DEEP, *add_up(true))):
        found = bounds[level]
        hidden = sum(int((reading[level] < 0).sum()) for pair in sent for reading in pair)
        if found is None:
            assert hidden == 0
            assert told[level] == exact
            continue
        assert (found.cells, told[level].suppressed) == (hidden, found)
        assert found.below == max(
            limit
            for pair, limit in zip(sent, limits, strict=True)
            if any((reading[level] < 0).any() for reading in pair)
        )
        for name in READINGS.values():
            low, high = getattr(found, name)
            assert low - 1e-12 <= getattr(exact, name) <= high + 1e-12
            assert 0 <= low <= high <= 1


def read(update: ModelUpdate) -> tuple[Confusion, Confusion]:
    argmax, path = (confusions(update, DEEP, reading) for reading in READINGS)
    assert argmax is not None
    assert path is not None
    return argmax, path


@pytest.mark.parametrize(
    ("metrics", "expected", "score"),
    [
        ([{"bags-kl": (0.5, 1.5)}] * 2, [{"kl": 0.5}, {"kl": 1.5}], 2.0),
        ([{"bags-kl": (0.5, 1.5)}, {"bags-kl": (1.5, 1.5), "bags-l1": (0.25, 1.0)}],
         [{"kl": 1.0, "l1": 0.25}, {"kl": 1.5, "l1": 1.0}], 2.5),
        ([{}, {"bags-kl": (0.5, 1.5)}], [{"kl": 0.5}, {"kl": 1.5}], 2.0),
        ([{"bags-l1": (0.25, 1.0)}], None, None),
        ([{}, {}], None, None),
    ],
)  # fmt: skip
def test_figures_of_held_back_bags_are_of_the_sites_that_sent_them(
    metrics: list[dict[str, Any]], expected: list[dict[str, float]] | None, score: float | None
) -> None:
    updates = [
        ModelUpdate(sender="a", round=1, arrays={}, metrics={"held-back-bags": 8, **sent}) for sent in metrics
    ]
    found = pooled_bag_figures(updates, DEEP)
    if expected is None:
        assert found is None
    else:
        levels = zip(DEEP.levels, expected, strict=True)
        assert found == [BagFigures(level=name, **level) for name, level in levels]
        assert selection_score(found) == score
