"""Build the privacy plan, which joins sampling, clipping, noise and the accounted event.

They are built together from the same numbers into one frozen object so that they cannot disagree, and
nothing else in fedbags may create an event of training, a sampler or noise. The plan states the cost of a
run; the ledger states what a site has spent over all runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.privacy import shared_noise
from common.privacy.accounting import calibrate, spent
from common.privacy.events import GRID_COST, Adjacency, DiscreteLaplace, PoissonGaussian
from common.privacy.proportions import noised
from common.privacy.randomness import InsecureSeededRandomness, Purpose, Randomness

if TYPE_CHECKING:
    from torch import Tensor

    from common.config_tables import DPConfig


_LEAST_CLIP_NORM, _LARGEST_CLIP_NORM = 1e-6, 1e6
"""Far outside these float32 holds no noise: its variance is zero below 1e-22, and gradients leave bare."""


_MOST_STEPS = 200_000
_MOST_FIGURES = 10_000
_LEAST_RATE = 1e-5
"""Bounds of what a run may ask for; beyond them the search for sigma takes minutes, or is of no use."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Hold what one run asks of one site, before any noise is found for it."""

    delta: float
    """Chance that the guarantee fails; below 1 / number_of_bags unless forced."""
    clip_norm: float
    """C: the norm that each bag's gradient is clipped to, and so the most that a bag adds to the sum."""
    number_of_bags: int
    """N: the bags that are trained on."""
    sample_rate: float
    """q, the chance of each bag to be in a step, in (0, 1]: Poisson sampling draws each bag on its own, and
    the accountant's amplification holds for nothing else."""
    steps_per_round: int
    """Optimiser steps of a round, those without a bag included."""
    rounds: int
    """Rounds of the whole run, not of what is left of it."""
    release: DiscreteLaplace | None
    """The release of proportions in the same budget, if this run makes one."""
    evaluation: tuple[DiscreteLaplace, ...] = ()
    """What one evaluation on held-back bags costs, one event a level; empty if none is made."""
    evaluations: int = 0
    """Evaluations on held-back bags in the whole run."""
    shares: int = 1
    """k: sites of whose noise the sum that is unmasked has at least this many shares, this site's among them.
    1: all noise is the site's own."""
    force_delta: bool = False
    """Accept a weak delta; ``PrivacyPlan.delta_is_weak`` then marks the plan."""

    def releases(self) -> tuple[DiscreteLaplace, ...]:
        """Return the events of everything that is released in addition to training."""
        # Every evaluation is listed as often as it takes place: each has fresh noise and costs again.
        return (*(() if self.release is None else (self.release,)), *self.evaluation * self.evaluations)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan(PlanSettings):
    """Describe the private training of one site in one run.

    Only ``build`` makes a plan, after checking and calibrating it. The mechanism of a step: draw each of N
    bags with chance q; clip the gradient of each drawn bag to norm C; add noise of standard deviation
    ``sigma*C`` to their sum; divide by q * N. The unit is the bag, and epsilon is for replacing one.
    """

    target_epsilon: float | None
    """What sigma was calibrated to; None when sigma was given."""
    noise_multiplier: float
    """sigma, relative to the clip norm."""
    randomness: Randomness
    """Where sampling and noise come from."""

    @classmethod
    def build(
        cls,
        settings: PlanSettings,
        randomness: Randomness,
        *,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        find_sigma: Callable[..., float] = calibrate,
    ) -> Self:
        """Check the settings and, given epsilon, find the noise for ALL rounds, evaluations and the release.

        Args:
            settings: of the run at this site.
            randomness: where sampling and noise come from.
            epsilon: the most that the run may spend at ``delta``; or give ``noise_multiplier``.
            noise_multiplier: sigma relative to the clip norm; 0 means no guarantee (epsilon infinite).
            find_sigma: ``calibrate``, or a function that remembers earlier results. The plan charges for
                the sigma that it returns, whatever that is.

        Raises:
            UserError: a setting is out of range or contradicts another; all faults are listed.
        """
        faults = _noise_faults(epsilon, noise_multiplier) + _faults(settings)
        bags = settings.number_of_bags
        if not faults and settings.delta >= 1 / bags and not settings.force_delta:
            faults.append(
                f"delta = {settings.delta:g} is not below 1 / {bags} bags: one bag could be given away "
                "entirely; use a smaller delta (or force it, and the report will say so)"
            )
        if faults:
            raise UserError("the privacy plan cannot be made:\n" + "\n".join(f"  {f}" for f in faults))
        if noise_multiplier is None:
            assert epsilon is not None
            # One search covers training and everything released in addition, so that all of it together
            # fits the budget.
            steps = settings.steps_per_round * settings.rounds
            noise_multiplier = find_sigma(
                epsilon - (GRID_COST * steps if settings.shares > 1 else 0.0),
                settings.delta,
                settings.sample_rate,
                steps,
                also=settings.releases(),
            )
            if settings.shares > 1:
                # All sites must add equal shares, and another machine's last digits may differ.
                noise_multiplier = _rounded_up(noise_multiplier)
        return cls(
            **vars(settings),
            target_epsilon=epsilon,
            noise_multiplier=float(noise_multiplier),
            randomness=randomness,
        )

    @property
    def noise_std(self) -> float:
        """Return the standard deviation of the noise on each coordinate of the clipped SUM, sigma * C."""
        return self.noise_multiplier * self.clip_norm

    @property
    def expected_bags(self) -> float:
        """Return q * N, by which the noisy sum is divided."""
        # Dividing by the number of bags that were drawn would reveal it, and it is private.
        return self.sample_rate * self.number_of_bags

    @property
    def delta_is_weak(self) -> bool:
        """Return True if delta is 1 / N or more, and was forced."""
        return self.delta >= 1 / self.number_of_bags

    @property
    def planned_epsilon(self) -> float:
        """Return the epsilon of the whole run at ``delta``, an upper bound by dp-accounting's PLD."""
        return spent(self.all_events(), self.delta, Adjacency.REPLACE_ONE)

    def round_event(self) -> PoissonGaussian:
        """Return the event of one round, which covers all its steps, the empty ones too."""
        return self._steps(self.steps_per_round)

    def all_events(self) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
        """Return the events of the whole run.

        They are the release, if there is one, every evaluation on held-back bags, and every step of every
        round.
        """
        training = self._steps(self.steps_per_round * self.rounds)
        return (*self.releases(), training)

    def sampler(self, round: int) -> Iterator[NDArray[np.int64]]:
        """Yield the bags of each step of a round as ``steps_per_round`` ascending index arrays.

        Some may be empty. An empty one is a step like the others: it adds noise, and its cost is in
        ``round_event``.
        """
        stream = self.randomness.stream(Purpose.SAMPLING, round)
        for _ in range(self.steps_per_round):
            yield stream.chosen(self.sample_rate, self.number_of_bags)

    def noise(self, shape: Sequence[int], round: int) -> "Tensor":
        """Return fresh normal noise of standard deviation ``noise_std``, float32, on the CPU."""
        import torch

        total = torch.zeros(tuple(shape))
        self.add_noise(total, round)
        return total

    def add_noise(self, total: "Tensor", round: int) -> None:
        """Add fresh noise to the clipped sum of one parameter, in place.

        The sum is float32, of any shape and on any device. Every call draws new numbers: call it once for
        each parameter and step.
        """
        if self.shares > 1:
            raise ValueError("this noise is one share of several, and goes into a masked sum alone")
        # The noise is made on the CPU, where the cryptographic generator is; another device gets a copy.
        if total.device.type != "cpu" or not total.is_contiguous():
            total.add_(self.noise(total.shape, round).to(total.device))
            return
        stream = self.randomness.stream(Purpose.NOISE, round)
        stream.add_normals(total.view(-1), self.noise_std)

    def noised_sum(self, total: NDArray[np.float64], steps_per_unit: float, round: int) -> NDArray[np.int64]:
        """Return a clipped sum on the grid of secure aggregation with this site's share of the noise.

        Args:
            total: all numbers of the sum, shape (n,); one bag moves it by at most the clip norm.
            steps_per_unit: of the grid.
            round: call it once in a round.

        Raises:
            UserError: the grid is too coarse for so many numbers.
            ValueError: the noise is not shared.
        """
        if self.shares == 1:
            raise ValueError("the noise of this plan is the site's own, and is not drawn on a grid")
        deviation = shared_noise.sum_deviation(
            self.noise_multiplier, steps_per_unit * self.clip_norm, len(total)
        )
        if not shared_noise.grid_is_fine(deviation, len(total), self.shares):
            raise UserError(
                f"the grid of secure aggregation is too coarse for noise on {len(total):,} numbers and "
                "the bags of all sites: train fewer numbers, or ask fewer sites"
            )
        noise = shared_noise.share(total.shape, deviation / math.sqrt(self.shares), self.randomness, round)
        return shared_noise.to_steps(total, steps_per_unit) + noise

    def noised_evaluation(self, sums: NDArray[np.int64], round: int) -> NDArray[np.int64]:
        """Return the sums of one evaluation, shape (levels,), with the noise that ``evaluation`` charges for.

        Raises:
            ValueError: the number of sums is not the number that was charged for.
        """
        if len(sums) != len(self.evaluation):
            raise ValueError(f"{len(self.evaluation)} sums were charged for, {len(sums)} are to be sent")
        return noised(sums, self.evaluation[0].scale, self.randomness, round)

    def _steps(self, steps: int) -> PoissonGaussian:
        return PoissonGaussian(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
            shares=self.shares,
            discrete=self.shares > 1,
        )


def shared_multiplier(dp: "DPConfig", rounds: int) -> float:
    """Return the noise multiplier that every site of a run with shared noise finds for itself.

    It depends on nothing of a site.

    Raises:
        UserError: no noise meets the target.
    """
    settings = PlanSettings(
        delta=dp.delta,
        clip_norm=dp.clip_norm,
        number_of_bags=1,
        sample_rate=dp.sample_rate,
        steps_per_round=dp.steps_per_round,
        rounds=rounds,
        release=DiscreteLaplace(scale=dp.release_scale),
        shares=2,
        force_delta=True,
    )
    randomness = InsecureSeededRandomness(0, "")  # nothing is drawn from it
    return PrivacyPlan.build(settings, randomness, epsilon=dp.epsilon).noise_multiplier


def _rounded_up(sigma: float) -> float:
    """Return the next number of four significant digits."""
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 3)
    return math.ceil(sigma / unit) * unit


def _noise_faults(epsilon: float | None, sigma: float | None) -> list[str]:
    faults = []
    # Sigma 0 may be given as a plan without a guarantee, but never together with a claimed epsilon.
    if sigma == 0 and epsilon is not None:
        faults.append(f"no noise (sigma 0) bounds nothing, yet epsilon = {epsilon:g} is claimed")
    elif (epsilon is None) == (sigma is None):
        faults.append("give either epsilon or the noise multiplier: each follows from the other")
    if epsilon is not None and not 0 < epsilon < math.inf:
        faults.append(f"epsilon = {epsilon:g} must be above 0 and finite")
    if sigma is not None and not 0 <= sigma < math.inf:
        faults.append(f"the noise multiplier {sigma:g} must be at least 0 and finite")
    return faults


def _faults(settings: PlanSettings) -> list[str]:
    bags, rate = settings.number_of_bags, settings.sample_rate
    faults = []
    if not 0 < settings.delta < 1:
        faults.append(f"delta = {settings.delta:g} must lie between 0 and 1")
    if not _LEAST_CLIP_NORM <= settings.clip_norm <= _LARGEST_CLIP_NORM:
        faults.append(
            f"the clip norm {settings.clip_norm:g} must lie between {_LEAST_CLIP_NORM:g} and "
            f"{_LARGEST_CLIP_NORM:g}"
        )
    if bags < 1:
        faults.append(f"there are {bags} bags to train on; at least one is needed")
    if not 0 < rate <= 1:
        faults.append(f"the sample rate {rate:g} must lie in (0, 1]; draw fewer bags per step")
    elif rate < _LEAST_RATE:
        faults.append(
            f"{rate * bags:g} expected bags per step of {bags} bags is a sample rate below "
            f"{_LEAST_RATE:g}; draw more bags per step"
        )
    if settings.steps_per_round < 1:
        faults.append(f"steps per round must be at least 1, got {settings.steps_per_round}")
    if settings.rounds < 1:
        faults.append(f"rounds must be at least 1, got {settings.rounds}")
    if settings.steps_per_round * settings.rounds > _MOST_STEPS:
        faults.append(
            f"{settings.steps_per_round} steps in {settings.rounds} rounds are more than {_MOST_STEPS} in all"
        )
    if len(settings.evaluation) * settings.evaluations > _MOST_FIGURES:
        faults.append(
            f"{settings.evaluations} evaluations of {len(settings.evaluation)} figures each are more than "
            f"{_MOST_FIGURES}; evaluate less often"
        )
    return faults
