"""Looks at held-back bags: bounded per bag, noised as charged, and never charged for less than they cost."""

import math

import numpy as np
import pytest

from common.privacy import proportions
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, DiscreteLaplace
from common.privacy.proportions import GRID, noised, to_grid
from common.privacy.randomness import InsecureSeededRandomness, Randomness, SecureRandomness

SEEDED = InsecureSeededRandomness(1, "site-1")
MANY = np.zeros(20_000, dtype=np.int64)


def check_noise(noise: np.ndarray, scale: float) -> None:
    """Discrete Laplace of t = scale * GRID: variance 2 a / (1 - a)^2 with a = exp(-1 / t)."""
    a = math.exp(-1 / (scale * GRID))
    assert noise.var() == pytest.approx(2 * a / (1 - a) ** 2, rel=0.1)
    assert abs(noise.mean()) < 0.05 * noise.std()


@pytest.mark.parametrize("source", [SecureRandomness(), SEEDED])
def test_the_noise_is_that_of_the_event(source: Randomness) -> None:
    check_noise(noised(MANY, 3.0, source, 1), 3.0)


def test_planted_bug_noise_for_a_step_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proportions, "GRID", 1)
    with pytest.raises(AssertionError):
        check_noise(noised(MANY, 3.0, SEEDED, 1), 3.0)


def test_rounds_have_noise_of_their_own_and_a_release_another() -> None:
    draws = [noised(MANY, 3.0, InsecureSeededRandomness(1, "site-1"), round) for round in (1, 2)]
    assert abs(np.corrcoef(draws)[0, 1]) < 0.05
    np.testing.assert_array_equal(draws[0], noised(MANY, 3.0, InsecureSeededRandomness(1, "site-1"), 1))


def test_one_bag_moves_a_sum_by_at_most_the_grid_whatever_the_model_says() -> None:
    values = np.array([0.0, 1.0, 0.5004, math.nan, math.inf, -math.inf, 1.0 + 1e-6, -1e-6])
    steps = to_grid(values)
    assert steps.tolist() == [0, GRID, 500, GRID, GRID, 0, GRID, 0]
    assert steps.max() - steps.min() == GRID


def test_the_charge_is_at_least_the_cost() -> None:
    """The exact loss of one figure: shifting discrete Laplace noise of t = b GRID by GRID steps."""
    b = 2.0
    support = np.arange(-60 * GRID, 60 * GRID)
    log = -np.abs(support) / (b * GRID)
    weights = np.exp(log) / np.exp(log).sum()
    shifted = np.exp(-np.abs(support - GRID) / (b * GRID)) / np.exp(log).sum()
    charged = spent([DiscreteLaplace(scale=b)], 1e-6, Adjacency.REPLACE_ONE)
    for epsilon, holds in ((charged, True), (1 / b, True), (0.9 / b, False)):
        delta = np.maximum(weights - math.exp(epsilon) * shifted, 0).sum()
        assert bool(delta <= 1e-6) == holds
    assert charged == pytest.approx(2 / b, rel=0.01)
