"""Quantisation: the error keeps its bound, the rounding is unbiased, and the sum never wraps."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RunError
from common.secure_aggregation.quantisation import Grid, mean_of, quantise

SENT = {"b": np.zeros(40_000, np.float32), "a": np.ones((200, 401), np.float32)}


def trained(seed: int, spread: float = 0.1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: (array + generator.normal(0, spread, array.shape)).astype(np.float32)
        for name, array in SENT.items()
    }


def error_bound(grid: Grid, weight: float) -> float:
    """The largest rounding error of a coordinate of the mean over sites with ``weight`` of all weights."""
    return grid.sites / (grid.scale * weight)


@settings(max_examples=15, deadline=None)
@given(
    sites=st.integers(2, 6),
    clip=st.sampled_from([0.5, 16.0, 1000.0]),
    lost=st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_weighted_mean_keeps_its_bound(sites: int, clip: float, lost: int, seed: int) -> None:
    models = [trained(seed + index) for index in range(sites)]
    weights = np.random.default_rng(seed).dirichlet(np.ones(sites)) + 0.05
    weights /= weights.sum()
    there = range(sites - lost)
    words = [quantise(SENT, models[index], Grid(clip, sites), float(weights[index])) for index in there]
    total = np.sum(words, axis=0, dtype=np.uint32)
    weight = float(weights[: sites - lost].sum())
    mean = mean_of(total, SENT, Grid(clip, sites), weight)
    bound = error_bound(Grid(clip, sites), weight)
    for name, array in SENT.items():
        exact = sum(
            weights[index] / weight * np.clip(models[index][name].astype(np.float64) - array, -clip, clip)
            for index in there
        )
        error = np.abs(mean[name] - (array + exact)).max()
        assert error <= bound + np.spacing(np.abs(mean[name]).max()) / 2


def test_the_bound_is_the_documented_figure() -> None:
    assert error_bound(Grid(16.0, 5), 1.0) == pytest.approx(3.7e-8, rel=0.01)


def test_rounding_is_unbiased_and_uses_both_neighbours() -> None:
    clip, sites, size = 2.0**20, 2, 200_000
    step = np.float32(1.25 / (Grid(clip, sites).scale * 0.5))  # 1.25 steps at weight 0.5
    sent = {"a": np.zeros(size, np.float32)}
    words = quantise(sent, {"a": np.full(size, -step)}, Grid(clip, sites), 0.5).view(np.int32)
    assert set(np.unique(words)) == {-2, -1}
    assert words.mean() == pytest.approx(-1.25, abs=0.006)  # 6 standard deviations of the mean
    assert not np.array_equal(
        words, quantise(sent, {"a": np.full(size, -step)}, Grid(clip, sites), 0.5).view(np.int32)
    )


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_largest_sum_does_not_wrap(side: float) -> None:
    sites, clip = 50, 16.0
    sent = {"a": np.zeros(1000, np.float32)}
    far = {"a": np.full(1000, side * 1e6, np.float32)}
    total = np.zeros(1000, np.uint32)
    for _ in range(sites):
        total += quantise(sent, far, Grid(clip, sites), 1 / sites)
    mean = mean_of(total, sent, Grid(clip, sites), 1.0)["a"]
    assert mean == pytest.approx(side * clip, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_not_sent(bad: float) -> None:
    model = trained(0)
    model["a"][3, 7] = bad
    with pytest.raises(RunError, match="not finite"):
        quantise(SENT, model, Grid(16.0, 2), 0.5)


@pytest.mark.parametrize(("clip", "refused"), [(0.01, True), (0.3, True), (0.5, False), (16.0, False)])
def test_an_update_that_is_mostly_clipped_is_not_sent(clip: float, refused: bool) -> None:
    """Sums of plus and minus the clip range, with weights that are known, tell every site's sign."""
    with pytest.raises(RunError, match="beyond the clip range") if refused else nullcontext():
        quantise(SENT, trained(0), Grid(clip, 2), 0.5, most_clipped=1e-3)


def test_words_that_no_clipping_site_sends_are_found_in_the_sum() -> None:
    words = quantise(SENT, trained(1), Grid(16.0, 2), 0.5)
    words[5] = 2**31 - 1
    with pytest.raises(RunError, match="out of range"):
        mean_of(words, SENT, Grid(16.0, 2), 0.5)
