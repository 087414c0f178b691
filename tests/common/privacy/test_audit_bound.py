"""The audit's bound: the paper's own figures, figures by hand, and never above the truth too often."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from deploy.audit.bound import (
    _p_value,
    best_bound,
    canaries_needed,
    lower_bound,
)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_figures_of_the_paper(
    canaries: int, guesses: int, correct: int, delta: float, published: float
) -> None:
    """arXiv 2305.08846, appendix D and section 7 (the second is cut off after three decimals)."""
    assert lower_bound(canaries, guesses, correct, delta, 0.95) == pytest.approx(published, abs=1e-3)


def test_p_value_by_hand() -> None:
    # Both of two guesses right at epsilon ln 3: chance 3/4 each. i = 1: P[B = 1] = 6/16; i = 2: 7/16 / 2.
    tail, steepest = 9 / 16, 6 / 16
    assert _p_value(2, 2, 2, math.log(3), 0.0) == pytest.approx(tail)
    assert _p_value(5, 2, 2, math.log(3), 0.01) == pytest.approx(tail + 2 * 5 * 0.01 * steepest)
    assert _p_value(5, 2, 0, 0.0, 0.01) == 1


@pytest.mark.parametrize("canaries", [10, 100, 1000])
def test_perfect_guesses_prove_what_the_formula_says(canaries: int) -> None:
    """delta 0: (e^eps / (1 + e^eps))^m = 0.05, so eps = logit(0.05^(1/m))."""
    chance = 0.05 ** (1 / canaries)
    expected = math.log(chance / (1 - chance))
    assert lower_bound(canaries, canaries, canaries, 0.0, 0.95) == pytest.approx(expected, abs=1e-6)
    assert lower_bound(canaries, canaries, canaries, 1e-3, 0.95) < expected


def test_guesses_by_chance_prove_nothing() -> None:
    assert lower_bound(100, 100, 50, 1e-5, 0.95) == 0
    assert lower_bound(100, 0, 0, 1e-5, 0.95) == 0
    assert lower_bound(100, 4, 4, 1e-5, 0.95) == 0  # one chance in sixteen


counts = st.integers(1, 200).flatmap(
    lambda guesses: st.tuples(st.just(guesses), st.integers(0, guesses - 1), st.integers(0, 100))
)


@settings(max_examples=60, deadline=None)
@given(counts, st.floats(0, 1e-3), st.floats(0.5, 0.999))
def test_more_right_guesses_never_prove_less(
    numbers: tuple[int, int, int], delta: float, confidence: float
) -> None:
    guesses, correct, abstained = numbers
    canaries = guesses + abstained
    bounds = [lower_bound(canaries, guesses, right, delta, confidence) for right in (correct, correct + 1)]
    assert 0 <= bounds[0] <= bounds[1] + 1e-9
    assert lower_bound(canaries + 50, guesses, correct, delta, confidence) <= bounds[0] + 1e-9


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_rarely_above_the_truth_of_randomised_response(epsilon: float) -> None:
    """Each coin is told truly with chance e^eps / (1 + e^eps): exactly epsilon, and the tightest case."""
    runs, canaries = 4000, 120
    right = np.random.default_rng(5).binomial(canaries, 1 / (1 + math.exp(-epsilon)), runs)
    bounds = {n: lower_bound(canaries, canaries, n, 0.0, 0.95) for n in set(right.tolist())}
    above = np.mean([bounds[n] > epsilon for n in right.tolist()])
    assert above <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert np.median(list(map(bounds.get, right.tolist()))) > 0.3 * epsilon  # and not for want of power


def test_rarely_above_the_truth_where_delta_fails_at_once() -> None:
    """With chance delta for each, a canary gives itself away: (epsilon, delta)-DP exactly."""
    epsilon, delta, runs, canaries = 1.0, 0.01, 2000, 100
    rng = np.random.default_rng(6)
    known = rng.binomial(canaries, delta, runs)
    right = known + rng.binomial(canaries - known, 1 / (1 + math.exp(-epsilon)))
    bounds = {n: lower_bound(canaries, canaries, n, delta, 0.95) for n in set(right.tolist())}
    assert np.mean([bounds[n] > epsilon for n in right.tolist()]) <= 0.05


def test_several_looks_share_the_error() -> None:
    alone = lower_bound(100, 25, 25, 1e-4, 0.975)
    bound = best_bound(100, [(25, 25), (100, 55)], 1e-4, 0.95)
    assert (bound.guesses, bound.correct, bound.lower_bound) == (25, 25, alone)
    assert best_bound(100, [(25, 25)], 1e-4, 0.95).lower_bound > alone


def test_canaries_needed_are_just_enough() -> None:
    number = canaries_needed(2.0, 1e-4, 0.95)
    assert number is not None
    assert lower_bound(number, number, number, 1e-4, 0.95) > 2.0
    assert lower_bound(number - 1, number - 1, number - 1, 1e-4, 0.95) <= 2.0
    assert canaries_needed(0.0, 0.0, 0.95) == 5  # 2^-5 < 0.05
    assert canaries_needed(30.0, 0.0, 0.95) is None


def test_planted_bug_without_the_correction_for_delta() -> None:
    """What the correction is worth: without it, the bound is too high."""
    uncorrected = float(binom.sf(74, 100, 1 / (1 + math.exp(-0.69))))
    assert uncorrected < _p_value(1000, 100, 75, 0.69, 1e-4)
    assert lower_bound(1000, 100, 75, 0.0, 0.95) > lower_bound(1000, 100, 75, 1e-4, 0.95) + 0.02


@pytest.mark.parametrize(
    "arguments", [(10, 11, 5, 1.0, 0.0), (10, 5, 6, 1.0, 0.0), (10, 5, 5, -1.0, 0.0), (10, 5, 5, 1.0, 2.0)]
)
def test_impossible_numbers_are_refused(arguments: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        _p_value(*arguments)
    with pytest.raises(ValueError, match="confidence"):
        lower_bound(10, 5, 5, 0.0, 1.0)
