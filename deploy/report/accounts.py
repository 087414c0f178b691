"""Compute every epsilon of the report from privacy events, once for sites whose events are equal.

The figures of record are those of ``common.privacy.accounting``. The second opinions beside them, by Opacus
and by a closed form, stand here and nowhere else. The module knows no ledger, run or page. Fifty sites of
different sizes share no figure, so many compositions go to worker processes.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Self

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from common.privacy.accounting import epsilon_curve, spent
from common.privacy.events import (
    GRID_COST,
    Adjacency,
    DiscreteLaplace,
    PoissonGaussian,
    alone,
    is_shared,
    merge,
)

Events = tuple[PoissonGaussian | DiscreteLaplace, ...]

ACCOUNTANT = "PLD (dp-accounting)"
_FEW = 6
"""Questions that are not worth a worker's start."""
_MOST_WORKERS = 8
_ORDERS = (*(1 + tenths / 10 for tenths in range(1, 100)), *range(12, 64))
"""The Renyi orders of Opacus's accountant."""


@dataclass(frozen=True)
class EpsilonQuery:
    """Hold what is asked about one site, with its events merged.

    Equal questions are answered once.
    """

    events: Events
    confirmed: Events
    delta: float
    next_round: Events
    """What one more round would cost; empty where that is not known."""
    more_rounds: tuple[int, ...]
    """Numbers of further rounds whose cost is asked."""
    prefixes: tuple[Events, ...]
    """The events up to some rounds, for the plot over rounds."""
    deltas: tuple[float, ...]
    """Further deltas at which the epsilon-over-delta curve is read."""
    stated: Events = ()
    """The events that the site stated to the server."""


@dataclass(frozen=True)
class Epsilons:
    """Hold the epsilons of one site, which are infinite where nothing is bounded."""

    epsilon: float
    confirmed: float
    stated: float
    add_remove: float
    without_amplification: float
    spending: tuple[float, ...]
    """Epsilons of the query's prefixes."""
    curve: tuple[tuple[float, float], ...]
    what_if: tuple[tuple[int, float], ...]
    """Epsilon by number of further rounds."""
    own_share: float | None
    """By the site's own shares of noise alone; None where no noise was shared."""
    stated_alone: float | None
    """The same, of the events that were stated."""
    opacus_rdp: float | None = None
    """Of the training steps alone; None where there are none."""


class Accountants:
    """Answer questions about epsilon, in worker processes when many are expected.

    The object is a context manager. Its worker processes start as soon as it is made, while the sources are
    read.
    """

    def __init__(self, expected: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        workers = min(os.cpu_count() or 1, _MOST_WORKERS)
        if expected > _FEW and workers > 1:
            # Fresh interpreters: forking a process that runs torch's threads can hang.
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"))
            for _ in range(workers):
                self._pool.submit(_load)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def answer_all(
        self, questions: Sequence[EpsilonQuery], meanwhile: Callable[[], None]
    ) -> dict[EpsilonQuery, Epsilons]:
        """Return the answer to each distinct question.

        Args:
            questions: one per site, where equal ones are answered once.
            meanwhile: called once, while the workers compute.

        Returns:
            The answers by question.
        """
        distinct = list(dict.fromkeys(questions))
        if self._pool is not None:
            answers = self._pool.map(_answer, distinct)
            meanwhile()
        else:
            meanwhile()
            answers = map(_answer, distinct)
        # Computed while the workers answer: a pool's map has started, and its results are read below.
        second = [_second_opinion(question) for question in distinct]
        return {q: replace(a, opacus_rdp=rdp) for q, a, rdp in zip(distinct, answers, second, strict=True)}


def _load() -> None:
    """Import what a worker will need, by asking a small question."""
    spent((PoissonGaussian(sample_rate=1.0, noise_multiplier=9.0, steps=1),), 0.5, Adjacency.ADD_REMOVE)


def _answer(question: EpsilonQuery) -> Epsilons:
    """Return all figures of a question by the accountant of record."""
    events, delta = question.events, question.delta
    whole = spent(events, delta, Adjacency.REPLACE_ONE)
    # Asked before the other figures, because the accountant caches only the newest few distributions and the
    # curve reads the one that `spent` composed just now.
    deltas = sorted({delta, *question.deltas}, reverse=True) if events and math.isfinite(whole) else []
    curve = epsilon_curve(events, Adjacency.REPLACE_ONE, deltas)
    return Epsilons(
        epsilon=whole,
        curve=curve,
        confirmed=spent(question.confirmed, delta, Adjacency.REPLACE_ONE),
        what_if=tuple(
            (rounds, spent((*events, *question.next_round * rounds), delta, Adjacency.REPLACE_ONE))
            for rounds in question.more_rounds
            if question.next_round and math.isfinite(whole)
        ),
        spending=tuple(spent(prefix, delta, Adjacency.REPLACE_ONE) for prefix in question.prefixes),
        stated=spent(question.stated, delta, Adjacency.REPLACE_ONE),
        add_remove=spent(events, delta, Adjacency.ADD_REMOVE),
        without_amplification=_without_amplification(events, delta),
        own_share=_by_own_share(events, delta),
        stated_alone=_by_own_share(question.stated, delta),
    )


def _by_own_share(events: Events, delta: float) -> float | None:
    """Return the replace-one epsilon without the noise of other sites, or None where none was shared."""
    return spent(merge(alone(events)), delta, Adjacency.REPLACE_ONE) if is_shared(events) else None


def _second_opinion(question: EpsilonQuery) -> float | None:
    """Return the epsilon of the training steps by Opacus's Renyi accountant, or None where there is none."""
    steps = [event for event in question.events if isinstance(event, PoissonGaussian)]
    if not steps or any(event.noise_multiplier == 0 for event in steps):
        return None
    # Opacus's function is taken out of its file, because importing the package loads torch and takes longer
    # than all the figures of fifty sites. A test holds the two results equal.
    rdp = _opacus_analysis()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Its fixed orders are too few for some settings, where the bound is loose but still correct.
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        losses = sum(
            rdp.compute_rdp(
                q=e.sample_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=_ORDERS
            )
            for e in steps
        )
        return float(rdp.get_privacy_spent(orders=_ORDERS, rdp=losses, delta=question.delta)[0])


@functools.cache
def _opacus_analysis() -> ModuleType:
    package = find_spec("opacus")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "accountants" / "analysis" / "rdp.py"
    spec = spec_from_file_location("fedbags_opacus_rdp", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _without_amplification(events: Events, delta: float) -> float:
    """Return the replace-one epsilon that would hold if every bag had been in every step.

    Steps without sampling are one Gaussian mechanism, whose epsilon has a closed form (Balle and Wang
    2018, theorem 8). The epsilons of releases are added to it, which can only overstate.
    """
    releases = sum(2 / event.scale for event in events if isinstance(event, DiscreteLaplace))
    steps = [event for event in events if isinstance(event, PoissonGaussian)]
    if any(event.noise_multiplier == 0 for event in steps):
        return math.inf
    if not steps:
        return releases
    # Replacing a bag moves the clipped sum by twice the clip norm.
    # The closed form is used because the accountant's grid would have to be so wide here that it takes ten
    # times as long as all the other figures.
    distance = 2 * math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in steps))
    grid = GRID_COST * sum(event.steps for event in steps if event.discrete)
    return releases + grid + _gaussian_epsilon(distance, delta)


def _gaussian_epsilon(distance: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian mechanism that moves by ``distance`` standard deviations."""

    def over(epsilon: float) -> float:
        first = ndtr(distance / 2 - epsilon / distance)
        # In logarithms, because exp(epsilon) overflows where ndtr is almost 0.
        second = math.exp(epsilon + log_ndtr(-distance / 2 - epsilon / distance))
        return float(first - second - delta)

    if over(0) <= 0:
        return 0.0
    highest = distance**2 / 2 + distance * math.sqrt(2 * math.log(1 / delta))
    return float(brentq(over, 0, highest, xtol=1e-9))
