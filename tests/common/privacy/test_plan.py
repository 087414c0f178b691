"""The plan: what it samples, adds and accounts for agree; each check is shown to find the bug it is for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from common.errors import UserError
from common.privacy import randomness
from common.privacy.accounting import calibrate, spent
from common.privacy.events import Adjacency, DiscreteLaplace
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness, Randomness, SecureRandomness, Stream

MakePlan = Callable[..., PrivacyPlan]
BOTH = pytest.mark.parametrize("source", [InsecureSeededRandomness(3, "site-1"), SecureRandomness()])
UNLIKELY = 1e-6
"""Chance that a correct generator fails a check (a secure one cannot be seeded)."""


def check_noise(plan: PrivacyPlan) -> None:
    """Noise is normal with the standard deviation that the accounted event claims."""
    claimed = plan.round_event().noise_multiplier * plan.clip_norm
    sample = plan.noise((400, 500), 1).flatten().double().numpy() / claimed
    assert abs(sample.std() - 1) < 5 / math.sqrt(2 * sample.size)
    assert stats.kstest(sample, "norm").pvalue > UNLIKELY


def check_sampling(plan: PrivacyPlan) -> None:
    """Every bag is in a step with the accounted chance, on its own, and empty steps are as frequent."""
    event, bags = plan.round_event(), plan.number_of_bags
    q, draws = event.sample_rate, list(plan.sampler(1))
    included = np.bincount(np.concatenate(draws), minlength=bags)
    spread = len(draws) * q * (1 - q)
    assert stats.chi2.sf(((included - len(draws) * q) ** 2 / spread).sum(), bags) > UNLIKELY
    empty = sum(len(draw) == 0 for draw in draws)
    assert stats.binomtest(empty, len(draws), (1 - q) ** bags).pvalue > UNLIKELY
    sizes = np.array([len(draw) for draw in draws])
    assert sizes.var() == pytest.approx(bags * q * (1 - q), rel=0.2)


def check_steps(plan: PrivacyPlan) -> None:
    """Every step that is accounted for is handed out, the empty ones too, in every round."""
    for round in range(1, plan.rounds + 1):
        draws = list(plan.sampler(round))
        assert len(draws) == plan.round_event().steps
        assert any(len(draw) == 0 for draw in draws)
    assert plan.all_events()[-1].model_dump()["steps"] == plan.round_event().steps * plan.rounds


def check_epsilon(plan: PrivacyPlan) -> None:
    """The claim covers an independent accountant's figure for all steps, and keeps the target."""
    step = PoissonSampledDpEvent(plan.sample_rate, GaussianDpEvent(plan.noise_multiplier))
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE)
    accountant.compose(SelfComposedDpEvent(step, plan.steps_per_round * plan.rounds))
    independent = accountant.get_epsilon(plan.delta)
    assert plan.planned_epsilon >= independent * (1 - 1e-4)
    if plan.target_epsilon is not None:
        assert plan.planned_epsilon <= plan.target_epsilon


def check_independent(plans: list[PrivacyPlan]) -> None:
    """Noise of different steps, rounds and sites is uncorrelated, and so is sampling of different sites."""
    size = 20_000
    vectors = [plan.noise((size,), round) for plan in plans for round in (1, 2) for _ in range(2)]
    for first, second in combinations(vectors, 2):
        assert abs(float(np.corrcoef(first, second)[0, 1])) < 6 / math.sqrt(size)
    draws = [np.concatenate(list(plan.sampler(1))) for plan in plans]
    for one, other in combinations(draws, 2):
        assert one.tolist() != other.tolist()


@BOTH
def test_noise_is_what_is_claimed(source: Randomness, make_plan: MakePlan) -> None:
    check_noise(make_plan(randomness=source))


def test_planted_bug_half_noise(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    half = property(lambda self: 0.5 * self.noise_multiplier * self.clip_norm)
    monkeypatch.setattr(PrivacyPlan, "noise_std", half)
    with pytest.raises(AssertionError):
        check_noise(make_plan())


@BOTH
def test_sampling_is_what_is_claimed(source: Randomness, make_plan: MakePlan) -> None:
    check_sampling(make_plan(randomness=source, steps_per_round=4000))


def test_planted_bug_twice_the_sample_rate(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Stream.chosen
    monkeypatch.setattr(Stream, "chosen", lambda self, chance, number: right(self, 2 * chance, number))
    with pytest.raises(AssertionError):
        check_sampling(make_plan(steps_per_round=4000))


def test_empty_steps_are_steps(make_plan: MakePlan) -> None:
    check_steps(make_plan(steps_per_round=40))


def test_planted_bug_a_forgotten_empty_step(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PrivacyPlan.sampler

    def forgetful(self: PrivacyPlan, round: int) -> Iterator[NDArray[np.int64]]:
        return (draw for draw in right(self, round) if len(draw))

    monkeypatch.setattr(PrivacyPlan, "sampler", forgetful)
    with pytest.raises(AssertionError):
        check_steps(make_plan(steps_per_round=40))


def test_epsilon_covers_all_rounds(make_plan: MakePlan) -> None:
    check_epsilon(make_plan())
    check_epsilon(make_plan(noise_multiplier=None, epsilon=2.0, rounds=30))


def test_planted_bug_epsilon_per_round(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_one_round(epsilon: float, delta: float, rate: float, steps: int, **more: Any) -> float:
        return calibrate(epsilon, delta, rate, steps // 30, **more)

    with pytest.raises(AssertionError):
        check_epsilon(make_plan(noise_multiplier=None, epsilon=2.0, rounds=30, find_sigma=of_one_round))
    monkeypatch.setattr(PrivacyPlan, "all_events", lambda self: (self.round_event(),))
    with pytest.raises(AssertionError):
        check_epsilon(make_plan(rounds=30))


@pytest.mark.parametrize("secure", [True, False])
def test_noise_never_repeats(secure: bool, make_plan: MakePlan) -> None:
    check_independent(
        [
            make_plan(randomness=SecureRandomness() if secure else InsecureSeededRandomness(3, site))
            for site in ("site-1", "site-2")
        ]
    )


def test_planted_bug_noise_repeated_between_clients(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = randomness._SeededStream
    monkeypatch.setattr(
        randomness, "_SeededStream", lambda seed, site, round, purpose: right(seed, "any", round, purpose)
    )
    plans = [make_plan(randomness=InsecureSeededRandomness(3, site)) for site in ("site-1", "site-2")]
    with pytest.raises(AssertionError):
        check_independent(plans)


def test_planted_bug_noise_repeated_between_rounds(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PrivacyPlan.noise

    def same(self: PrivacyPlan, shape: tuple[int, ...], round: int) -> Tensor:
        return right(make_plan(), shape, 1)

    monkeypatch.setattr(PrivacyPlan, "noise", same)
    with pytest.raises(AssertionError):
        check_independent([make_plan()])


def test_a_seeded_round_can_be_repeated_and_a_secure_one_cannot(make_plan: MakePlan) -> None:
    first, second = (make_plan(randomness=InsecureSeededRandomness(3, "site-1")) for _ in range(2))
    second.noise((7,), 1)  # what round 1 took does not move round 2
    assert first.noise((3, 5), 2).tolist() == second.noise((3, 5), 2).tolist()
    assert [d.tolist() for d in first.sampler(2)] == [d.tolist() for d in second.sampler(2)]
    one, other = (make_plan(randomness=SecureRandomness()) for _ in range(2))
    assert one.noise((3, 5), 2).tolist() != other.noise((3, 5), 2).tolist()
    assert one.randomness.secure
    assert "INSECURE" in first.randomness.description


def test_a_forked_process_draws_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SecureRandomness()
    parents = source.stream(randomness.Purpose.NOISE, 1)
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert source.stream(randomness.Purpose.NOISE, 1) is not parents


def test_shapes_and_figures(make_plan: MakePlan) -> None:
    plan = make_plan(release=DiscreteLaplace(scale=8.0))
    assert plan.noise((2, 3), 1).shape == (2, 3)
    assert plan.noise((), 1).shape == ()
    assert plan.noise((0, 3), 1).shape == (0, 3)
    assert plan.noise_std == 1.0
    assert plan.expected_bags == pytest.approx(1.2)
    assert plan.sample_rate == pytest.approx(0.1)
    assert plan.round_event().steps == 5
    assert [event.kind for event in plan.all_events()] == ["discrete_laplace", "poisson_gaussian"]
    everyone = make_plan(sample_rate=1.0)
    assert next(everyone.sampler(1)).tolist() == list(range(12))
    with pytest.raises(FrozenInstanceError):
        plan.clip_norm = 2.0  # type: ignore[misc]


def test_the_release_is_paid_from_the_same_target(make_plan: MakePlan) -> None:
    settings = {"noise_multiplier": None, "epsilon": 2.0}
    alone, shared = make_plan(**settings), make_plan(**settings, release=DiscreteLaplace(scale=4.0))
    assert shared.noise_multiplier > alone.noise_multiplier
    assert shared.planned_epsilon <= 2.0


LOOKS = {"evaluation": (DiscreteLaplace(scale=60.0),) * 3, "evaluations": 4}


def check_looks(plan: PrivacyPlan) -> None:
    """What a run with four looks really does costs no more than the target."""
    done = [*LOOKS["evaluation"] * 4, *[plan.round_event()] * plan.rounds]
    assert spent(done, plan.delta, Adjacency.REPLACE_ONE) <= 2.0
    assert plan.planned_epsilon == pytest.approx(spent(done, plan.delta, Adjacency.REPLACE_ONE))


def test_looks_are_paid_from_the_same_target(make_plan: MakePlan) -> None:
    settings = {"noise_multiplier": None, "epsilon": 2.0}
    plan = make_plan(**settings, **LOOKS)
    check_looks(plan)
    assert plan.noise_multiplier > make_plan(**settings).noise_multiplier
    assert plan.noised_evaluation(np.zeros(3, dtype=np.int64), 1).shape == (3,)
    with pytest.raises(ValueError, match="3 sums were charged for, 4"):
        plan.noised_evaluation(np.zeros(4, dtype=np.int64), 1)
    with pytest.raises(UserError, match="evaluate less often"):
        make_plan(**settings, evaluation=[DiscreteLaplace(scale=1.0)] * 3, evaluations=4)
    assert len(make_plan(evaluations=4).all_events()) == 1


def test_planted_bug_looks_that_are_not_in_the_plan(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivacyPlan, "releases", lambda self: ())
    with pytest.raises(AssertionError):
        check_looks(make_plan(noise_multiplier=None, epsilon=2.0, **LOOKS))


def test_sites_of_different_size_get_different_noise(make_plan: MakePlan) -> None:
    sigmas = [
        make_plan(
            noise_multiplier=None, epsilon=2.0, number_of_bags=bags, sample_rate=4 / bags
        ).noise_multiplier
        for bags in (12, 60, 300)
    ]
    assert sigmas == sorted(sigmas, reverse=True)


def test_a_weak_delta_is_refused_unless_forced_and_then_marked(make_plan: MakePlan) -> None:
    with pytest.raises(UserError, match="1 / 12 bags"):
        make_plan(delta=0.1)
    assert make_plan(delta=0.1, force_delta=True).delta_is_weak
    assert not make_plan().delta_is_weak


def test_no_noise_claims_nothing(make_plan: MakePlan) -> None:
    plan = make_plan(noise_multiplier=0.0)
    assert plan.planned_epsilon == math.inf
    assert not plan.noise((5,), 1).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 0.0, "epsilon": 8.0}, "sigma 0"),
        ({"noise_multiplier": 1.0, "epsilon": 8.0}, "either"),
        ({"noise_multiplier": None}, "either"),
        ({"noise_multiplier": None, "epsilon": 0.0}, "epsilon = 0"),
        ({"noise_multiplier": None, "epsilon": -1.0}, "epsilon = -1"),
        ({"noise_multiplier": None, "epsilon": math.inf}, "epsilon = inf"),
        ({"noise_multiplier": -1.0}, "noise multiplier"),
        ({"noise_multiplier": math.nan}, "noise multiplier"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0, "force_delta": True}, "delta"),
        ({"clip_norm": 0.0}, "clip norm"),
        ({"number_of_bags": 0}, "0 bags"),
        ({"sample_rate": 1.1}, "sample rate"),
        ({"sample_rate": 0.0}, "sample rate"),
        ({"steps_per_round": 0}, "steps per round"),
        ({"rounds": 0}, "rounds"),
        (
            {"noise_multiplier": None, "epsilon": 1.0, "release": DiscreteLaplace(scale=1.0)},
            "beside training",
        ),
    ],
)
def test_one_clear_error_for_bad_settings(
    changes: dict[str, object], message: str, make_plan: MakePlan
) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(**changes)


def test_all_faults_are_told_together(make_plan: MakePlan) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(clip_norm=-1.0, rounds=0, delta=2.0)
    assert all(word in str(caught.value) for word in ("clip norm", "rounds", "delta"))


def test_epsilon_is_for_replacing_a_bag(make_plan: MakePlan) -> None:
    plan = make_plan(noise_multiplier=None, epsilon=2.0)
    assert spent(plan.all_events(), plan.delta, Adjacency.ADD_REMOVE) < 0.99 * plan.planned_epsilon
    assert plan.planned_epsilon == spent(plan.all_events(), plan.delta, Adjacency.REPLACE_ONE)
