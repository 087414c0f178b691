"""Epsilons: the published table, other accountants, and what must hold for all settings."""

import math

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from common.privacy import accounting
from common.privacy.accounting import (
    calibrate,
    epsilon_curve,
    fits,
    spent,
)
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, event_from_dict, merge
from tests.cases import shortened
from tests.reference_accounting import delta_at, opacus_prv, opacus_rdp, without_amplification

REPLACE, ADD_REMOVE = Adjacency.REPLACE_ONE, Adjacency.ADD_REMOVE

TABLE = [  # q, sigma, steps, delta: Opacus RDP, Opacus PRV, PLD add/remove, PLD replace-one
    (0.01, 1, 1000, 1e-5, 2.1014, 1.8384, 1.8282, 2.8434),
    (0.1, 2, 200, 1e-5, 3.6797, 3.3699, 3.3597, 6.5362),
    (0.1, 1, 500, 1e-4, 16.141, 14.640, 14.629, 26.039),
    (0.25, 4, 400, 1e-3, 4.7927, 4.2688, 4.2584, 10.128),
    (1, 10, 100, 1e-5, 4.7285, 4.3874, 4.3772, 9.9973),
]

SIGMAS = st.floats(0.7, 8).map(lambda value: round(value, 2))
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.3, 1.0])


def steps(q: float, sigma: float, number: int) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=float(q), noise_multiplier=float(sigma), steps=number)


@pytest.mark.parametrize(("q", "sigma", "number", "delta", "rdp", "prv", "add_remove", "replace"), TABLE)
def test_every_figure_of_the_published_table(
    q: float,
    sigma: float,
    number: int,
    delta: float,
    rdp: float,
    prv: float,
    add_remove: float,
    replace: float,
) -> None:
    events = [steps(q, sigma, number)]
    assert spent(events, delta, REPLACE) == pytest.approx(replace, rel=0.01)
    assert spent(events, delta, ADD_REMOVE) == pytest.approx(add_remove, rel=0.01)
    assert opacus_rdp(events, delta) == pytest.approx(rdp, rel=0.01)
    assert opacus_prv(events, delta) == pytest.approx(prv, rel=0.01)


ROWS = [row[:4] for row in TABLE]


@pytest.mark.parametrize(("q", "sigma", "number", "delta"), shortened(ROWS, ROWS[:2]))
def test_never_below_a_finer_independent_accountant(
    q: float, sigma: float, number: int, delta: float
) -> None:
    for adjacency, relation in (
        (REPLACE, NeighboringRelation.REPLACE_ONE),
        (ADD_REMOVE, NeighboringRelation.ADD_OR_REMOVE_ONE),
    ):
        accountant = PLDAccountant(relation, value_discretization_interval=1e-4)
        step = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
        accountant.compose(SelfComposedDpEvent(step, number))
        independent = accountant.get_epsilon(delta)
        ours = spent([steps(q, sigma, number)], delta, adjacency)
        assert independent * (1 - 1e-4) <= ours <= independent * 1.002


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_one_step_of_every_bag_is_the_gaussian_mechanism(adjacency: Adjacency) -> None:
    """Balle & Wang 2018, theorem 8: an exact delta, by no accountant at all."""
    shift = {REPLACE: 2.0, ADD_REMOVE: 1.0}[adjacency] / 3.0
    for epsilon in (0.1, 0.5, 1.5):

        def normal(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        exact = normal(shift / 2 - epsilon / shift) - math.exp(epsilon) * normal(-shift / 2 - epsilon / shift)
        ours = delta_at([steps(1, 3, 1)], epsilon, adjacency)
        assert exact <= ours * (1 + 1e-9)
        assert ours == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("scale", "expected"), [(None, 2.937), (1.0, 4.830), (2.0, 3.774)])
def test_a_release_composes_with_training(scale: float | None, expected: float) -> None:
    events = [steps(0.1, 4, 200), *([DiscreteLaplace(scale=scale)] if scale else [])]
    assert spent(events, 1e-5, REPLACE) == pytest.approx(expected, rel=0.001)


def test_a_release_alone_costs_two_mechanisms_under_replace_one() -> None:
    release = [DiscreteLaplace(scale=4.0)]
    assert spent(release, 1e-12, REPLACE) == pytest.approx(2 / 4, rel=0.005)
    assert spent(release, 1e-12, ADD_REMOVE) == pytest.approx(1 / 4, rel=0.005)


def test_calibration_gives_the_published_sigma() -> None:
    assert calibrate(3, 1e-5, 0.1, 200) == pytest.approx(3.925, rel=0.01)


def test_an_order_or_a_division_of_the_steps_changes_nothing() -> None:
    whole = [DiscreteLaplace(scale=2.0), steps(0.1, 2, 30), steps(0.2, 3, 5)]
    parts = [steps(0.2, 3, 5), *[steps(0.1, 2, 10)] * 3, DiscreteLaplace(scale=2.0)]
    assert merge(whole) == merge(parts)
    assert spent(whole, 1e-5, REPLACE) == spent(parts, 1e-5, REPLACE)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert spent([], 1e-5, REPLACE) == 0
    assert fits([], 0.1, 1e-5, REPLACE)
    assert delta_at([], 0.1, REPLACE) == 0
    for event in (steps(0.1, 0, 1), DiscreteLaplace(scale=1e-4)):
        assert spent([event], 1e-5, REPLACE) == math.inf
        assert delta_at([event], 100, REPLACE) == 1
        assert not fits([event], 1e9, 1e-5, REPLACE)
    assert opacus_rdp([steps(0.1, 0, 1)], 1e-5) == math.inf


def test_hardly_any_noise_is_accounted_without_exhausting_memory() -> None:
    assert spent([steps(0.01, 0.1, 100_000)], 1e-5, REPLACE) > 1e4
    assert spent([steps(1e-5, 50, 1000)], 1e-5, REPLACE) < 1e-3


def test_the_curve_and_its_inverse_agree() -> None:
    events = [steps(0.1, 2, 200)]
    for delta, epsilon in epsilon_curve(events, REPLACE, [1e-7, 1e-5, 1e-3]):
        assert delta_at(events, epsilon, REPLACE) == pytest.approx(delta, rel=0.01)


def test_without_amplification_every_bag_is_in_every_step() -> None:
    events = [steps(0.1, 10, 100), DiscreteLaplace(scale=3.0)]
    assert without_amplification(events, 1e-5, REPLACE) == spent(
        [steps(1, 10, 100), DiscreteLaplace(scale=3.0)], 1e-5, REPLACE
    )


def test_opacus_cannot_hold_a_release() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        opacus_prv([steps(0.1, 2, 10), DiscreteLaplace(scale=1.0)], 1e-5)


def test_a_release_that_takes_all_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="beside training"):
        calibrate(1, 1e-5, 0.1, 10, also=[DiscreteLaplace(scale=1.0)])


def test_a_delta_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="delta"):
        spent([steps(0.1, 1, 1)], 0.0, REPLACE)


@settings(max_examples=4, deadline=None)
@given(q=RATES, sigma=SIGMAS, number=st.integers(1, 300), more=st.integers(1, 100))
def test_monotone_in_steps_noise_and_sampling(q: float, sigma: float, number: int, more: int) -> None:
    for adjacency in Adjacency:
        base = spent([steps(q, sigma, number)], 1e-5, adjacency)
        slack = 1 + 1e-9
        assert base <= spent([steps(q, sigma, number + more)], 1e-5, adjacency) * slack
        # Another sigma or rate may be composed on another grid, hence the grid's own accuracy.
        assert spent([steps(q, sigma * 1.1, number)], 1e-5, adjacency) <= base * 1.002
        assert base <= spent([steps(min(1, q * 1.2), sigma, number)], 1e-5, adjacency) * 1.002
    assert spent([steps(q, sigma, number)], 1e-5, ADD_REMOVE) <= spent(
        [steps(q, sigma, number)], 1e-5, REPLACE
    ) * (1 + 1e-9)


@settings(max_examples=3, deadline=None)
@given(
    epsilon=st.floats(0.3, 20),
    q=RATES,
    number=st.integers(1, 300),
    scale=st.none() | st.floats(2, 10).map(lambda b: round(b, 1)),
)
def test_calibration_never_overspends_and_wastes_little(
    epsilon: float, q: float, number: int, scale: float | None
) -> None:
    also = [] if scale is None else [DiscreteLaplace(scale=scale)]
    if also and spent(also, 1e-5, REPLACE) > 0.8 * epsilon:
        return
    sigma = calibrate(epsilon, 1e-5, q, number, also=also)
    total = spent([*also, steps(q, sigma, number)], 1e-5, REPLACE)
    assert 0.995 * epsilon <= total <= epsilon
    assert fits([*also, steps(q, sigma, number)], epsilon, 1e-5, REPLACE)


@settings(max_examples=4, deadline=None)
@given(sigma=SIGMAS, number=st.integers(1, 300), q=RATES)
def test_the_second_accountant_agrees(sigma: float, number: int, q: float) -> None:
    """Opacus's PRV says an upper bound too, within 0.01 of the limit; RDP is looser, never tighter."""
    events = [steps(q, sigma, number)]
    ours = spent(events, 1e-5, ADD_REMOVE)
    assert ours == pytest.approx(opacus_prv(events, 1e-5), rel=0.01, abs=0.025)
    assert ours <= opacus_rdp(events, 1e-5) * 1.002


def test_planted_bug_an_epsilon_for_add_remove_sold_as_replace_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = accounting._step
    monkeypatch.setattr(
        accounting, "_step", lambda q, sigma, _, interval: right(q, sigma, ADD_REMOVE, interval)
    )
    accounting._epsilon.cache_clear()
    accounting._fine.cache_clear()
    accounting._coarse.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_every_figure_of_the_published_table(*TABLE[0])
    finally:
        monkeypatch.undo()
        accounting._epsilon.cache_clear()
        accounting._fine.cache_clear()
        accounting._coarse.cache_clear()


@pytest.mark.parametrize("event", [steps(0.1, 2, 30), steps(1, 0, 1), DiscreteLaplace(scale=2.5)])
def test_events_survive_json(event: PoissonGaussian | DiscreteLaplace) -> None:
    assert event_from_dict(event.model_dump()) == event
    assert type(event).model_validate_json(event.model_dump_json()) == event


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1},
        {"kind": "poisson_gaussian", "sample_rate": 1.5, "noise_multiplier": 1.0, "steps": 1},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": -1.0, "steps": 1},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": math.nan, "steps": 1},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 0},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": "3"},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "x": 1},
        {"kind": "poisson_gaussian", "sample_rate": 0.1, "steps": 1},
        {"kind": "discrete_laplace", "scale": 0.0},
        {"scale": 1.0},
    ],
)
def test_a_malformed_event_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        event_from_dict(data)


def test_a_quotient_beyond_float64_is_no_warning() -> None:
    """Found by drawing settings: here dp-accounting divides by a mass near the smallest float."""
    assert calibrate(1.0, 1e-5, 1.0, 277) > 0
