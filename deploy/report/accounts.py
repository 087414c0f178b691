"""Every epsilon of the report, from events; computed once for sites whose events are equal.

Only asks ``common.privacy.accounting``; knows no ledger, run or page. Fifty sites of different sizes
share no figure, so many compositions go to worker processes: half of a report's time is this module.
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

from common.privacy.accounting import epsilon_curve, spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian

Events = tuple[PoissonGaussian | DiscreteLaplace, ...]

ACCOUNTANT = "PLD (dp-accounting)"
FEW = 6
"""Questions that are not worth a worker's start."""
MOST_WORKERS = 8
ORDERS = (*(1 + tenths / 10 for tenths in range(1, 100)), *range(12, 64))
"""The Renyi orders of Opacus's accountant."""


@dataclass(frozen=True)
class Question:
    """What is asked about one site; equal questions are answered once. Events are merged ones."""

    events: Events
    confirmed: Events
    delta: float
    next_round: Events
    """What one more round would cost; empty where that is not known."""
    more_rounds: tuple[int, ...]
    """How many of them to ask for."""
    prefixes: tuple[Events, ...]
    """The events up to some rounds, for the plot over rounds."""
    deltas: tuple[float, ...]
    """Where the epsilon-over-delta curve is read, beside ``delta``."""
    stated: Events = ()
    """The events that the site told the server."""


@dataclass(frozen=True)
class Answer:
    """Epsilons; infinite where nothing is bounded."""

    epsilon: float
    confirmed: float
    stated: float
    add_remove: float
    without_amplification: float
    prefixes: tuple[float, ...]
    curve: tuple[tuple[float, float], ...]
    more_rounds: tuple[tuple[int, float], ...]
    opacus_rdp: float | None = None
    """Of the training steps alone; None where there are none."""


class Accountants:
    """Answers questions; a context. Its worker processes start at once where many questions are expected."""

    def __init__(self, expected: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        workers = min(os.cpu_count() or 1, MOST_WORKERS)
        if expected > FEW and workers > 1:
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
        self, questions: Sequence[Question], meanwhile: Callable[[], None]
    ) -> dict[Question, Answer]:
        """The answer to each distinct question; ``meanwhile`` is done while workers are at it."""
        distinct = list(dict.fromkeys(questions))
        if self._pool is not None:
            answers = self._pool.map(answer, distinct)
            meanwhile()
        else:
            meanwhile()
            answers = map(answer, distinct)
        second = [_second_opinion(question) for question in distinct]
        return {q: replace(a, opacus_rdp=rdp) for q, a, rdp in zip(distinct, answers, second, strict=True)}


def _load() -> None:
    """Import what a worker will need."""
    spent((PoissonGaussian(sample_rate=1.0, noise_multiplier=9.0, steps=1),), 0.5, Adjacency.ADD_REMOVE)


def answer(question: Question) -> Answer:
    """All figures by the accountant of record."""
    events, delta = question.events, question.delta
    whole = spent(events, delta, Adjacency.REPLACE_ONE)
    # In this order, for the accountant keeps the few newest distributions: the curve reads the last one.
    deltas = sorted({delta, *question.deltas}, reverse=True) if events and math.isfinite(whole) else []
    curve = epsilon_curve(events, Adjacency.REPLACE_ONE, deltas)
    return Answer(
        epsilon=whole,
        curve=curve,
        confirmed=spent(question.confirmed, delta, Adjacency.REPLACE_ONE),
        more_rounds=tuple(
            (rounds, spent((*events, *question.next_round * rounds), delta, Adjacency.REPLACE_ONE))
            for rounds in question.more_rounds
            if question.next_round and math.isfinite(whole)
        ),
        prefixes=tuple(spent(prefix, delta, Adjacency.REPLACE_ONE) for prefix in question.prefixes),
        stated=spent(question.stated, delta, Adjacency.REPLACE_ONE),
        add_remove=spent(events, delta, Adjacency.ADD_REMOVE),
        without_amplification=_without_amplification(events, delta),
    )


def _second_opinion(question: Question) -> float | None:
    """What ``accounting.opacus_rdp`` says of the training steps.

    Opacus's function is taken out of its file: importing the package takes torch, and longer than all the
    figures of fifty sites. A test holds the two equal.
    """
    steps = [event for event in question.events if isinstance(event, PoissonGaussian)]
    if not steps or any(event.noise_multiplier == 0 for event in steps):
        return None
    rdp = _opacus_analysis()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Its fixed orders are too few for some settings; the bound is loose then, not wrong.
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        losses = sum(
            rdp.compute_rdp(
                q=e.sample_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=ORDERS
            )
            for e in steps
        )
        return float(rdp.get_privacy_spent(orders=ORDERS, rdp=losses, delta=question.delta)[0])


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
    """Epsilon for replace-one had every bag been in every step.

    Steps without sampling are one Gaussian mechanism, whose epsilon has a closed form (Balle and Wang
    2018, theorem 8); releases are added to it, which can only overstate. The grid of the accountant would
    have to be so wide here that it takes ten times as long as all the other figures.
    """
    releases = sum(2 / event.scale for event in events if isinstance(event, DiscreteLaplace))
    steps = [event for event in events if isinstance(event, PoissonGaussian)]
    if any(event.noise_multiplier == 0 for event in steps):
        return math.inf
    if not steps:
        return releases
    # Replacing a bag moves the clipped sum by twice the clip norm.
    distance = 2 * math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in steps))
    return releases + _gaussian_epsilon(distance, delta)


def _gaussian_epsilon(distance: float, delta: float) -> float:
    """The smallest epsilon of a Gaussian mechanism that moves by ``distance`` standard deviations."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def over(epsilon: float) -> float:
        first = ndtr(distance / 2 - epsilon / distance)
        second = math.exp(epsilon + log_ndtr(-distance / 2 - epsilon / distance))
        return float(first - second - delta)

    if over(0) <= 0:
        return 0.0
    highest = distance**2 / 2 + distance * math.sqrt(2 * math.log(1 / delta))
    return float(brentq(over, 0, highest, xtol=1e-9))
