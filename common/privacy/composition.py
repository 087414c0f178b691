"""Compose privacy loss distributions and carry a composition forward to later events.

Composing a step with new noise costs a construction of its distribution, which takes up to half a second,
so an account of hundreds of different steps takes minutes. Up to ``DIRECT`` different events everything is
composed each time. Beyond that, earlier compositions on the same grid are kept in memory, and only later
events are composed onto them. A composition states exactly which events it holds and is used for accounts
that contain all of them, so nothing is left out and nothing counts twice.

Both ways compose the same upper bounds (grid, rounding, and tails that go to an infinite loss), and
composition does not depend on the order. They differ by rounding and by 1e-15 of tail mass a composition,
which moves epsilon by less than 1e-6.
"""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian

_Event = tuple[float, ...]
"""One step ``(sample rate, noise multiplier)``, or one release ``(scale,)``."""
_Amounts = Mapping[_Event, int]
"""How often each different event happened."""

DIRECT = 16
"""Up to so many different events, everything is composed each time."""
_KEPT = 8
"""So many compositions stay in memory, the last used; each takes at most about 32 MiB."""


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


def compose(amounts: _Amounts, adjacency: Adjacency, interval: float, *, afresh: bool = False) -> Any:
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


def _forget() -> None:
    """Forget everything that was composed before."""
    global _kept
    _kept = ()


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
        told = json.loads(arrays["arr_0"].tobytes())
        compositions = tuple(
            Composition(
                {tuple(event): number for event, number in one["amounts"]},
                Adjacency.REPLACE_ONE,
                one["interval"],
                PrivacyLossDistribution(
                    DensePLDPmf(one["interval"], one["lowest"], arrays[f"arr_{place}"], one["infinite"], True)
                ),
            )
            for place, one in enumerate(told["compositions"], start=1)
        )
    return told["about"], compositions


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
