"""Compute epsilons from the events of ``common.privacy.events`` by pure functions.

Every epsilon is for the unit that the events' noise was scaled to (see events.py), the adjacency and delta
that are asked for, and the accountant that is named. The accountant of record is dp-accounting's privacy
loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022), the only one that takes replace-one
for the sampled Gaussian and that can hold the Laplace release. Losses are rounded to a grid upwards
("connect the dots"), so every figure is an upper bound; the grid is chosen to stay within about 0.2% of the
limit. Accounts of many different events build on what was composed before (``common.privacy.composition``).
"""

import math
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from common.errors import UserError
from common.privacy.composition import amounts_of, compose
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, merge

_Events = tuple[PoissonGaussian | DiscreteLaplace, ...]

_FINEST, _COARSEST = 2.0**-16, 2.0**-10
"""Bounds of the loss grid's interval (dp-accounting's default is 1e-4)."""
_COARSENING = 8
"""The first, cheap bound uses a grid this much wider."""
_POINTS = 2**22
"""About the most grid points that a composed distribution may take (1 s, 100 MiB)."""
_LEAST_SCALE = 1e-3
"""A release with less noise (epsilon above 2000) counts as not private at all."""
_LARGEST_SIGMA = 1e6
_CALIBRATION_SECONDS = 120.0
"""The most that a search for sigma may take; usual settings take seconds."""


def spent(events: Iterable[PoissonGaussian | DiscreteLaplace], delta: float, adjacency: Adjacency) -> float:
    """Return the epsilon of all ``events`` together, at ``delta``.

    Args:
        events: all that was done, in any order.
        delta: in (0, 1).
        adjacency: replace-one is what budgets are enforced on.

    Returns:
        An upper bound on epsilon (dp-accounting PLD); infinite where nothing is bounded, as without noise.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    # Merging puts equal events into one entry and one order, so that equal spending gives equal floats.
    return _epsilon(merge(events), delta, adjacency, False)


def fits(
    events: Iterable[PoissonGaussian | DiscreteLaplace],
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    *,
    afresh: bool = False,
) -> bool:
    """Return True if ``spent`` stays at or under ``epsilon``.

    This is cheaper than ``spent``, because a coarser bound mostly suffices. With ``afresh``, everything is
    composed from the events and nothing that was composed before is used.
    """
    merged = merge(events)
    if not merged or not _is_bounded(merged):
        return not merged
    coarse = _coarse(merged, adjacency, afresh).get_epsilon_for_delta(delta)
    # The coarse bound lies above the fine one, so a yes from it is final and a no is not.
    return bool(coarse <= epsilon) or _epsilon(merged, delta, adjacency, afresh) <= epsilon


def epsilon_curve(
    events: Iterable[PoissonGaussian | DiscreteLaplace], adjacency: Adjacency, deltas: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    """Return ``(delta, epsilon)`` for each delta.

    These pairs are one guarantee read at several failure probabilities.
    """
    merged = merge(events)
    return tuple((delta, spent(merged, delta, adjacency)) for delta in deltas)


def calibrate(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    *,
    also: Iterable[PoissonGaussian | DiscreteLaplace] = (),
) -> float:
    """Return the smallest noise multiplier (to 0.01%) whose steps and ``also`` meet the target.

    Epsilon is for replacing one unit, on which sites enforce their budgets.

    Args:
        target_epsilon: the most that all of it may spend at ``delta``.
        delta: in (0, 1).
        sample_rate: q of every step.
        steps: ALL steps, of all rounds; an epsilon per round means nothing.
        also: other events in the same budget, such as a release of proportions.

    Returns:
        sigma with ``spent(also + steps) <= target_epsilon``, checked on the value returned.

    Raises:
        UserError: ``also`` leaves nothing of the target, or the search takes too long.
    """
    others, adjacency = tuple(also), Adjacency.REPLACE_ONE
    # Unusual settings could keep the search busy for minutes; the user gets an error that says what to
    # change.
    deadline = time.monotonic() + _CALIBRATION_SECONDS

    def over(sigma: float) -> float:
        """Return log(spent / target), which falls with sigma and is at most 0 when the target holds."""
        if time.monotonic() > deadline:
            raise UserError(
                f"the noise for {steps} steps at sample rate {sample_rate:g} was not found within "
                f"{_CALIBRATION_SECONDS:g} s: ask for fewer steps or looks, or for more bags per step"
            )
        # ALL steps of all rounds are composed: an epsilon per round bounds nothing over the run.
        event = PoissonGaussian(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return math.log(max(min(spent((*others, event), delta, adjacency), 1e9), 1e-9) / target_epsilon)

    if others and not fits(others, target_epsilon, delta, adjacency):
        raise UserError(
            f"what is released beside training (label counts, noised metrics) spends "
            f"{spent(others, delta, adjacency):.4g} alone, more than epsilon = {target_epsilon:g}: release "
            "with a larger scale, look less often, release nothing, or raise epsilon."
        )
    good = 1.0
    while over(good) > 0:
        good *= 2
        if good > _LARGEST_SIGMA:
            raise UserError(
                f"no noise up to {_LARGEST_SIGMA:g} times the clip norm spends {target_epsilon:g}"
            )
    bad = good / 2
    while over(bad) <= 0:
        good, bad = bad, bad / 2
        if bad < 1 / _LARGEST_SIGMA:
            return good
    from scipy.optimize import brentq

    root = brentq(lambda log_sigma: over(math.exp(log_sigma)), math.log(bad), math.log(good), xtol=1e-5)
    sigma = math.exp(root)
    while over(sigma) > 0:  # the root is as likely just below the target's sigma as above it
        sigma *= 1 + 1e-5
    return sigma


def _is_bounded(merged: _Events) -> bool:
    return all(
        event.scale >= _LEAST_SCALE if isinstance(event, DiscreteLaplace) else event.noise_multiplier > 0
        for event in merged
    )


# The same events are asked about in planning, in every round and in the report, and composing them takes
# seconds.
@lru_cache(maxsize=4096)
def _epsilon(merged: _Events, delta: float, adjacency: Adjacency, afresh: bool) -> float:
    if not merged or not _is_bounded(merged):
        return math.inf if merged else 0.0
    return float(_fine(merged, adjacency, afresh).get_epsilon_for_delta(delta))


@lru_cache(maxsize=8)
def _coarse(merged: _Events, adjacency: Adjacency, afresh: bool) -> Any:
    """Compose the events on a wide grid for a cheap upper bound."""
    interval = _COARSENING * _interval(merged)
    for event in merged:
        if isinstance(event, PoissonGaussian):
            # Hardly any noise: the largest loss of a step, with eight standard deviations of a sum of them.
            largest = 2 / event.noise_multiplier**2 + 20 / event.noise_multiplier
            interval = max(interval, _power_of_two(largest * math.sqrt(event.steps) * 4 / _POINTS))
    return compose(amounts_of(merged), adjacency, interval, afresh=afresh)


@lru_cache(maxsize=8)
def _fine(merged: _Events, adjacency: Adjacency, afresh: bool) -> Any:
    """Compose the events on the grid that the figures come from."""
    coarse = _coarse(merged, adjacency, afresh)
    epsilon = coarse.get_epsilon_for_delta(1e-6)
    # Nothing is promised at such an epsilon, so a finer grid would be wasted time.
    if epsilon > 1000:
        return coarse
    # The grid is widened where the composed losses would otherwise take more than POINTS grid points.
    interval = max(_interval(merged), _power_of_two(8 * (epsilon + 5) / _POINTS))
    return compose(amounts_of(merged), adjacency, interval, afresh=afresh)


def _interval(merged: _Events) -> float:
    """Return a grid interval that is fine against one step's typical loss, about q / sigma.

    The number of steps does not matter.
    """
    losses = [e.sample_rate / e.noise_multiplier for e in merged if isinstance(e, PoissonGaussian)]
    return min(max(_power_of_two(min(losses, default=1) / 8), _FINEST), _COARSEST)


def _power_of_two(value: float) -> float:
    """Return the largest power of two that is not above ``value``."""
    # Few different grids, so that caches and kept compositions, which hold for one grid, are found again.
    return 2.0 ** math.floor(math.log2(value))
