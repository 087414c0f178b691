"""Every epsilon of the report, from events; computed once for sites whose events are equal.

Only asks ``common.privacy.accounting``; knows no ledger, run or page. Fifty sites of different sizes
share no figure, so many compositions go to worker processes: half of a report's time is this module.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from common.privacy.accounting import epsilon_curve, opacus_rdp, spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian

Events = tuple[PoissonGaussian | DiscreteLaplace, ...]

ACCOUNTANT = "PLD (dp-accounting)"
DELTAS = tuple(10.0**-exponent for exponent in range(2, 11, 2))
"""Where the epsilon-over-delta curve is read, beside the site's own delta."""
FEW = 6
"""Questions that are not worth a worker's start."""


@dataclass(frozen=True)
class Question:
    """What is asked about one site; equal questions are answered once. Events are merged ones."""

    events: Events
    confirmed: Events
    delta: float
    next_round: PoissonGaussian | None
    """What one more round would cost."""
    more_rounds: tuple[int, ...]
    """How many of them to ask for."""
    prefixes: tuple[Events, ...]
    """The events up to some rounds, for the plot over rounds."""
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


def answer_all(questions: Sequence[Question], meanwhile: Callable[[], None]) -> dict[Question, Answer]:
    """The answer to each distinct question; ``meanwhile`` is done while workers are at it."""
    distinct = list(dict.fromkeys(questions))
    workers = min(os.cpu_count() or 1, 8)
    if len(distinct) <= FEW or workers == 1:
        meanwhile()
        return {question: replace(answer(question), opacus_rdp=_opacus(question)) for question in distinct}
    # Fresh interpreters: forking a process that runs torch's threads can hang. Opacus takes longer to
    # import than to ask, so this process does that part alone while the workers do the others.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        answers = pool.map(answer, distinct, chunksize=2)
        meanwhile()
        seconds = [_opacus(question) for question in distinct]
        return {
            question: replace(found, opacus_rdp=second)
            for question, found, second in zip(distinct, answers, seconds, strict=True)
        }


def answer(question: Question) -> Answer:
    """All figures by the accountant of record."""
    events, delta = question.events, question.delta
    whole = spent(events, delta, Adjacency.REPLACE_ONE)
    # In this order, for the accountant keeps the few newest distributions: the curve reads the last one.
    deltas = sorted({delta, *DELTAS}, reverse=True) if events and math.isfinite(whole) else []
    curve = epsilon_curve(events, Adjacency.REPLACE_ONE, deltas)
    return Answer(
        epsilon=whole,
        curve=curve,
        confirmed=spent(question.confirmed, delta, Adjacency.REPLACE_ONE),
        more_rounds=tuple(
            (rounds, spent((*events, *[question.next_round] * rounds), delta, Adjacency.REPLACE_ONE))
            for rounds in question.more_rounds
            if question.next_round is not None and math.isfinite(whole)
        ),
        prefixes=tuple(spent(prefix, delta, Adjacency.REPLACE_ONE) for prefix in question.prefixes),
        stated=spent(question.stated, delta, Adjacency.REPLACE_ONE),
        add_remove=spent(events, delta, Adjacency.ADD_REMOVE),
        without_amplification=_without_amplification(events, delta),
    )


def _opacus(question: Question) -> float | None:
    steps = [event for event in question.events if isinstance(event, PoissonGaussian)]
    return opacus_rdp(steps, question.delta) if steps else None


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
