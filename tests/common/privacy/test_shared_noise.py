"""Noise that sites share: the grid's cost, the accountant of discrete noise, and planted bugs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.config_tables import DPConfig
from common.errors import UserError
from common.privacy import shared_noise
from common.privacy.accounting import spent
from common.privacy.events import (
    GRID_COST,
    Adjacency,
    DiscreteLaplace,
    PoissonGaussian,
    alone,
    event_from_dict,
    is_shared,
    merge,
)
from common.privacy.plan import PrivacyPlan, shared_multiplier
from common.privacy.randomness import InsecureSeededRandomness, Randomness, SecureRandomness
from common.privacy.shared_noise import grid_is_fine, sum_deviation, to_steps

MakePlan = Callable[..., PrivacyPlan]
UNLIKELY = 1e-6
STEPS_PER_UNIT = 2.0**19


def discrete_gaussian(s: float, reach: int) -> NDArray[np.float64]:
    """The probabilities at -reach..reach, by the definition."""
    z = np.arange(-reach, reach + 1)
    mass = np.exp(-(z**2) / (2 * s**2))
    return np.asarray(mass / mass.sum())


@pytest.mark.parametrize("s", [40.0, 200.0])
def test_a_discrete_gaussian_is_a_rounded_continuous_one_up_to_the_stated_factor(s: float) -> None:
    reach = int(10 * s)
    z = np.arange(-reach, reach + 1)
    exact = discrete_gaussian(s, 2 * reach)[reach : 3 * reach + 1]
    # By the log of the survival function, which keeps its digits far out.
    upper, lower = stats.norm.logsf((abs(z) - 0.5) / s), stats.norm.logsf((abs(z) + 0.5) / s)
    rounded = upper + np.log1p(-np.exp(lower - upper))
    assert np.abs(np.log(exact) - rounded).max() <= 101 / (20 * s**2)


@pytest.mark.parametrize("shares", [2, 5])
def test_a_sum_of_shares_is_one_discrete_gaussian(shares: int) -> None:
    own, total = discrete_gaussian(8.0, 100), np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, own)
    wanted = discrete_gaussian(8.0 * math.sqrt(shares), 100 * shares)
    np.testing.assert_allclose(total, wanted, atol=1e-14)


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize(("sigma", "number"), [(2.0, 1), (8.0, 40)])
def test_the_accountant_of_discrete_noise_agrees(rate: float, sigma: float, number: int) -> None:
    """dp-accounting's own discrete Gaussian, on a grid of 40 steps, against the continuous limit."""
    grid = 40
    second = pld.from_discrete_gaussian_mechanism(
        sigma * grid, sensitivity=grid, value_discretization_interval=1e-4, sampling_prob=rate
    ).self_compose(number)
    event = PoissonGaussian(sample_rate=rate, noise_multiplier=sigma, steps=number, shares=3, discrete=True)
    ours = spent((event,), 1e-4, Adjacency.ADD_REMOVE)
    assert ours == pytest.approx(second.get_epsilon_for_delta(1e-4), rel=0.01)
    continuous = event.model_copy(update={"discrete": False})
    assert ours - spent((continuous,), 1e-4, Adjacency.ADD_REMOVE) == pytest.approx(GRID_COST * number)


def test_the_grid_that_is_fine_enough_costs_what_is_charged() -> None:
    for numbers in (10, 10_000):
        least = next(s for s in np.geomspace(100, 1e9, 2000) if grid_is_fine(float(s), numbers, 1))
        assert 2 * numbers * 101 / (20 * least**2) <= GRID_COST
        assert least >= 1000
    assert not grid_is_fine(1500.0, 1, 4)  # a share of 750 is too narrow
    assert not grid_is_fine(0.0, 1, 1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 2**32 - 1), st.floats(0.5, 1e5))
def test_rounding_moves_two_sums_apart_by_no_more_than_is_accounted(
    values: list[float], seed: int, steps: float
) -> None:
    total = np.array(values)
    change = np.random.default_rng(seed).normal(size=len(total))
    change /= np.linalg.norm(change)
    moved = np.linalg.norm((to_steps(total + change, steps) - to_steps(total, steps)).astype(float))
    # The sum's own sensitivity is 1, of a step of the grid each number is rounded by half at most, twice.
    assert moved <= sum_deviation(1.0, steps, len(total)) * (1 + 1e-9)


def test_what_is_no_number_counts_as_nothing() -> None:
    assert to_steps(np.array([np.nan, np.inf, -np.inf, 1.26]), 10.0).tolist() == [0, 0, 0, 13]


def check_share(plan: PrivacyPlan) -> None:
    """The share's variance is the k-th part of what was accounted for the sum, rounding included."""
    zeros = np.zeros(40_000)
    noise = plan.noised_sum(zeros, STEPS_PER_UNIT, 1)
    wanted = sum_deviation(plan.noise_multiplier, STEPS_PER_UNIT * plan.clip_norm, len(zeros))
    scaled = noise / (wanted / math.sqrt(plan.shares))
    assert abs(scaled.mean()) * math.sqrt(len(zeros)) < 5
    ratio = float((scaled**2).sum())
    assert UNLIKELY < stats.chi2.cdf(ratio, len(zeros)) < 1 - UNLIKELY


@pytest.mark.parametrize("source", [InsecureSeededRandomness(3, "site-1"), SecureRandomness()])
def test_a_share_is_what_is_claimed(source: Randomness, make_plan: MakePlan) -> None:
    check_share(make_plan(shares=4, randomness=source))


@pytest.mark.parametrize("factor", [0.5, 0.95])
def test_planted_bug_too_small_a_share(
    factor: float, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = shared_noise.share
    monkeypatch.setattr(shared_noise, "share", lambda shape, s, *rest: drawn(shape, s * factor, *rest))
    with pytest.raises(AssertionError):
        check_share(make_plan(shares=4))


def test_shares_of_different_sites_and_rounds_are_different(make_plan: MakePlan) -> None:
    zeros = np.zeros(50)
    made = [
        make_plan(shares=2, randomness=InsecureSeededRandomness(3, site)).noised_sum(
            zeros, STEPS_PER_UNIT, round
        )
        for site in ("a", "b")
        for round in (1, 2)
    ]
    assert len({tuple(noise.tolist()) for noise in made}) == 4


def test_each_kind_of_noise_has_one_way_out(make_plan: MakePlan) -> None:
    """A share alone would protect too little in an update, and noise of its own is no share."""
    with pytest.raises(ValueError, match="one share of several"):
        make_plan(shares=2).noise((3,), 1)
    with pytest.raises(ValueError, match="the site's own"):
        make_plan().noised_sum(np.zeros(3), STEPS_PER_UNIT, 1)
    with pytest.raises(UserError, match="too coarse"):
        make_plan(shares=2).noised_sum(np.zeros(3), 10.0, 1)


def test_a_plan_with_shared_noise_charges_for_the_sum_and_tells_of_the_share(make_plan: MakePlan) -> None:
    plan = make_plan(shares=4, noise_multiplier=None, epsilon=2.0, delta=1e-4, sample_rate=0.5)
    event = plan.round_event()
    assert (event.shares, event.discrete) == (4, True)
    assert plan.planned_epsilon <= 2.0
    assert plan.planned_epsilon == pytest.approx(2.0, rel=5e-3)
    (own,) = alone((event,))
    assert isinstance(own, PoissonGaussian)
    assert own.noise_multiplier == event.noise_multiplier / 2
    assert (own.shares, own.discrete) == (1, True)
    assert spent(alone(plan.all_events()), 1e-4, Adjacency.REPLACE_ONE) > 1.8 * plan.planned_epsilon


@pytest.mark.parametrize("digits", [1e-9, -1e-9])
def test_all_sites_find_the_same_noise_whatever_they_have_and_whatever_machine(
    digits: float, make_plan: MakePlan
) -> None:
    dp = DPConfig(epsilon=2.0, sample_rate=0.5, steps_per_round=1, noise="shared")
    common = shared_multiplier(dp, 20)
    sigma = common - 1e-3 * common  # as a search would find it, a little below
    for bags in (12, 400):
        plan = make_plan(
            shares=3, noise_multiplier=None, epsilon=2.0, delta=dp.delta, sample_rate=0.5, steps_per_round=1,
            rounds=20, number_of_bags=bags, release=DiscreteLaplace(scale=dp.release_scale),
        )  # fmt: skip
        assert plan.noise_multiplier == common
    nearby = [
        make_plan(
            shares=3, noise_multiplier=None, epsilon=2.0, find_sigma=lambda *_, also, s=s: s
        ).noise_multiplier
        for s in (sigma, sigma * (1 + digits))
    ]
    assert nearby[0] == nearby[1] >= sigma


def test_events_of_a_sites_own_noise_keep_the_form_that_is_hashed() -> None:
    own = PoissonGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=3)
    assert own.model_dump() == {
        "kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 2.0, "steps": 3
    }  # fmt: skip
    shared = own.model_copy(update={"shares": 4, "discrete": True})
    as_numbers = {key: float(v) if isinstance(v, int) else v for key, v in shared.model_dump().items()}
    assert event_from_dict(as_numbers) == shared
    assert not is_shared((own,))
    assert is_shared((own, shared))
    assert len(merge((own, shared, own, shared))) == 2
    assert alone((own, DiscreteLaplace(scale=2.0))) == (own, DiscreteLaplace(scale=2.0))


@pytest.mark.parametrize("content", [{"shares": 0}, {"shares": 1.5}, {"discrete": 2}, {"discrete": "yes"}])
def test_a_malformed_share_is_refused(content: dict[str, Any]) -> None:
    base = {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 2.0, "steps": 3}
    with pytest.raises(ValueError, match=r"shares|discrete"):
        event_from_dict({**base, **content})
