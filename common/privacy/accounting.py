"""Compute epsilons from the events of ``common.privacy.events`` by pure functions.

Every epsilon is for the unit that the events' noise was scaled to (see events.py), the adjacency and delta
that are asked for, and the accountant that is named. The accountant of record is dp-accounting's privacy
loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022), the only one that takes replace-one
for the sampled Gaussian and that can hold the Laplace release. Losses are rounded to a grid upwards
("connect the dots"), so every figure is an upper bound; the grid is chosen to stay within about 0.2% of the
limit.

Composing a step with new noise costs a construction of its distribution, which takes up to half a second,
so an account of hundreds of different steps takes minutes. Up to ``DIRECT`` different events everything is
composed each time. Beyond that, earlier compositions on the same grid are kept in memory, and only later
events are composed onto them. A composition states exactly which events it holds and is used for accounts
that contain all of them, so nothing is left out and nothing counts twice. Both ways compose the same upper
bounds (grid, rounding, and tails that go to an infinite loss), and composition does not depend on the order.
They differ by rounding and by 1e-15 of tail mass a composition, which moves epsilon by less than 1e-6.
"""

import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from common.errors import UserError
from common.privacy.events import GRID_COST, Adjacency, DiscreteLaplace, PoissonGaussian, merge

_Event = tuple[float, ...]
"""One step ``(sample rate, noise multiplier)``, or one release ``(scale,)``."""
_Amounts = Mapping[_Event, int]
"""Number of times that each different event happened."""

DIRECT = 16
"""Up to so many different events, everything is composed each time."""
_KEPT = 8
"""So many compositions stay in memory, the last used; each takes at most about 32 MiB."""

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


@dataclass(frozen=True, eq=False)
class Composition:
    """Hold the privacy loss distribution of some events together, an upper bound on one grid."""

    amounts: _Amounts
    adjacency: Adjacency
    interval: float
    pld: Any


_kept: tuple[Composition, ...] = ()


def amounts_of(events: Iterable[PoissonGaussian | DiscreteLaplace]) -> dict[_Event, int]:
    """Count each different step or release among the events, in the order of first occurrence."""
    amounts: dict[_Event, int] = {}
    for event in events:
        if isinstance(event, DiscreteLaplace):
            amounts[(event.scale,)] = amounts.get((event.scale,), 0) + 1
        else:
            step = (event.sample_rate, event.noise_multiplier)
            amounts[step] = amounts.get(step, 0) + event.steps
    return amounts


def _compose(amounts: _Amounts, adjacency: Adjacency, interval: float, *, afresh: bool = False) -> Any:
    """Return the privacy loss distribution of all these events together.

    Args:
        amounts: at least one event.
        adjacency: how neighbours differ.
        interval: of the grid of losses.
        afresh: use nothing that was composed before.
    """
    # ``ledger verify`` composes afresh, so that its figure does not depend on what was carried forward.
    if afresh or len(amounts) <= DIRECT:
        return reduce(_both, _parts(amounts, adjacency, interval))
    known = [kept for kept in _kept if kept.adjacency is adjacency and _within(kept.amounts, amounts)]
    here = [kept for kept in known if kept.interval == interval]
    found = max(here, key=lambda kept: _size(kept.amounts), default=None)
    if found is not None:
        keep(found)
    # The largest part that is known on any grid is what is spent already. Composed by itself on this grid
    # too, it serves the next question as well, where what is asked now may be refused.
    parts = [kept.amounts for kept in known if kept.amounts != amounts]
    largest = max(parts, key=_size, default=amounts)
    for target in (largest, amounts):
        if found is None:
            pld = reduce(_both, _parts(target, adjacency, interval))
        elif found.amounts != target and _within(found.amounts, target):
            rest = {event: number - found.amounts.get(event, 0) for event, number in target.items()}
            pld = reduce(_both, _parts(rest, adjacency, interval), found.pld)
        else:
            continue
        found = Composition(dict(target), adjacency, interval, pld)
        keep(found)
    assert found is not None
    return found.pld


def keep(composition: Composition) -> None:
    """Remember a composition as the last used, and forget the least recently used one."""
    global _kept
    others = [kept for kept in _kept if kept is not composition]
    _kept = (*others, composition)[-_KEPT:]


def kept_for(amounts: _Amounts, adjacency: Adjacency) -> tuple[Composition, ...]:
    """Return, for each grid, the remembered composition that holds most of these events."""
    best: dict[float, Composition] = {}
    for kept in _kept:
        if kept.adjacency is adjacency and _within(kept.amounts, amounts):
            before = best.get(kept.interval, kept)
            best[kept.interval] = max(before, kept, key=lambda one: _size(one.amounts))
    return tuple(best.values())


def pack(compositions: Iterable[Composition], about: Mapping[str, Any]) -> bytes:
    """Write compositions under replace-one, and a JSON object, as bytes.

    Raises:
        ValueError: a distribution differs between its two directions, as under add/remove.
    """
    described, arrays = [], []
    for composition in compositions:
        if not composition.pld._symmetric:
            raise ValueError("only what is the same in both directions can be packed")
        # dp-accounting has no public way to store a distribution, so its private parts are read here and
        # rebuilt in unpack.
        pmf = composition.pld._pmf_remove.to_dense_pmf()
        described.append(
            {
                "amounts": [[list(event), number] for event, number in composition.amounts.items()],
                "interval": composition.interval,
                "lowest": int(pmf._lower_loss),
                "infinite": float(pmf._infinity_mass),
            }
        )
        arrays.append(pmf._probs)
    text = json.dumps({"about": dict(about), "compositions": described})
    stream = io.BytesIO()
    # Without pickle, because a reader of a pickled file runs whatever code stands in it.
    np.savez(stream, np.frombuffer(text.encode(), dtype=np.uint8), *arrays, allow_pickle=False)
    return stream.getvalue()


def unpack(content: bytes) -> tuple[Mapping[str, Any], tuple[Composition, ...]]:
    """Read the JSON object and the compositions from bytes that ``pack`` made.

    The content is believed: the caller must know that the bytes were not changed.
    """
    from dp_accounting.pld.pld_pmf import DensePLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        stored = json.loads(arrays["arr_0"].tobytes())
        compositions = tuple(
            Composition(
                {tuple(event): number for event, number in one["amounts"]},
                Adjacency.REPLACE_ONE,
                one["interval"],
                PrivacyLossDistribution(
                    DensePLDPmf(one["interval"], one["lowest"], arrays[f"arr_{place}"], one["infinite"], True)
                ),
            )
            for place, one in enumerate(stored["compositions"], start=1)
        )
    return stored["about"], compositions


def _size(amounts: _Amounts) -> int:
    return sum(amounts.values())


def _within(part: _Amounts, whole: _Amounts) -> bool:
    return all(whole.get(event, 0) >= number for event, number in part.items())


def _both(one: Any, other: Any) -> Any:
    return one.compose(other)


def _parts(amounts: _Amounts, adjacency: Adjacency, interval: float) -> list[Any]:
    return [
        (_step if len(event) == 2 else _release)(*event, adjacency, interval).self_compose(number)
        for event, number in amounts.items()
        if number
    ]


@lru_cache(maxsize=32)
def _step(sample_rate: float, noise_multiplier: float, adjacency: Adjacency, interval: float) -> Any:
    """Return the distribution of one step of DP-SGD, where replace-one moves the sum by two clip norms."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    relation = {
        Adjacency.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
        Adjacency.ADD_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    }[adjacency]
    return pld.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=relation,
    )


@lru_cache(maxsize=32)
def _release(scale: float, adjacency: Adjacency, interval: float) -> Any:
    """Return the distribution of one release of counts.

    A unit of m images moves at most m images out of some counts and m into others. Noise of scale b m makes
    each of the two a (1/b)-DP mechanism, whatever the classes; discrete Laplace of sensitivity 1 has only
    the losses +-1/b, so it is randomised response, which dominates every (1/b)-DP mechanism. Add/remove
    moves images one way only, which is one such mechanism. Bags compose in parallel.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    # dp-accounting takes no Laplace event under replace-one, so it is built from two one-way shifts.
    one_way = pld.from_discrete_laplace_mechanism(
        1 / scale, sensitivity=1, value_discretization_interval=interval
    )
    return one_way.compose(one_way) if adjacency is Adjacency.REPLACE_ONE else one_way


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
    coarse = _epsilon_at(_coarse(merged, adjacency, afresh), delta) + _cost_of_grid(merged)
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
    return _search(target_epsilon, delta, sample_rate, steps, tuple(also))


# Sites of a simulation that have equally many bags ask for the same noise.
@lru_cache(maxsize=64)
def _search(target_epsilon: float, delta: float, sample_rate: float, steps: int, others: _Events) -> float:
    """Return what ``calibrate`` finds, and remember it."""
    adjacency = Adjacency.REPLACE_ONE
    # Unusual settings could keep the search busy for minutes; the user gets an error that says what to
    # change.
    deadline = time.monotonic() + _CALIBRATION_SECONDS

    def over(sigma: float) -> float:
        """Return log(spent / target), which falls with sigma and is at most 0 when the target holds."""
        if time.monotonic() > deadline:
            raise UserError(
                f"the noise for {steps} steps at sample rate {sample_rate:g} was not found within "
                f"{_CALIBRATION_SECONDS:g} s: ask for fewer steps or evaluations, or for more bags per step"
            )
        # ALL steps of all rounds are composed: an epsilon per round bounds nothing over the run.
        event = PoissonGaussian(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return math.log(max(min(spent((*others, event), delta, adjacency), 1e9), 1e-9) / target_epsilon)

    if others and not fits(others, target_epsilon, delta, adjacency):
        raise UserError(
            f"what is released beside training (label counts, noised metrics) spends "
            f"{spent(others, delta, adjacency):.4g} alone, more than epsilon = {target_epsilon:g}: release "
            "with a larger scale, evaluate less often, release nothing, or raise epsilon."
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
    return _epsilon_at(_fine(merged, adjacency, afresh), delta) + _cost_of_grid(merged)


def _cost_of_grid(merged: _Events) -> float:
    """Return what discrete noise costs beyond the continuous one that the distributions are of."""
    return GRID_COST * sum(e.steps for e in merged if isinstance(e, PoissonGaussian) and e.discrete)


@lru_cache(maxsize=8)
def _coarse(merged: _Events, adjacency: Adjacency, afresh: bool) -> Any:
    """Compose the events on a wide grid for a cheap upper bound."""
    interval = _COARSENING * _interval(merged)
    for event in merged:
        if isinstance(event, PoissonGaussian):
            # Hardly any noise: the largest loss of a step, with eight standard deviations of a sum of them.
            largest = 2 / event.noise_multiplier**2 + 20 / event.noise_multiplier
            interval = max(interval, _power_of_two(largest * math.sqrt(event.steps) * 4 / _POINTS))
    return _compose(amounts_of(merged), adjacency, interval, afresh=afresh)


@lru_cache(maxsize=8)
def _fine(merged: _Events, adjacency: Adjacency, afresh: bool) -> Any:
    """Compose the events on the grid that the figures come from."""
    coarse = _coarse(merged, adjacency, afresh)
    epsilon = _epsilon_at(coarse, 1e-6)
    # Nothing is promised at such an epsilon, so a finer grid would be wasted time.
    if epsilon > 1000:
        return coarse
    # The grid is widened where the composed losses would otherwise take more than _POINTS grid points.
    interval = max(_interval(merged), _power_of_two(8 * (epsilon + 5) / _POINTS))
    return _compose(amounts_of(merged), adjacency, interval, afresh=afresh)


def _epsilon_at(composed: Any, delta: float) -> float:
    """Return the epsilon of composed losses at delta."""
    # A quotient beyond float64 counts as infinite, as its logarithm is above every loss.
    with np.errstate(over="ignore"):
        return float(composed.get_epsilon_for_delta(delta))


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
