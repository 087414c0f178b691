"""Compute every epsilon of the report from privacy events, once for sites whose events are equal.

The module asks ``common.privacy.accounting`` only, and knows no ledger, run or page. Fifty sites of different
sizes share no figure, so many compositions go to worker processes. Half of a report's time is spent here.

Write the texts of the seventeen things that a rigorous privacy report discloses.

The page adds their tables. Every number here is taken from the figures that stand in the same report.
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
from deploy.report.model import Disclosure
from deploy.report.prose import (
    UNITS,
    Told,
    listed,
    summary,
)

Events = tuple[PoissonGaussian | DiscreteLaplace, ...]

ACCOUNTANT = "PLD (dp-accounting)"
FEW = 6
"""Questions that are not worth a worker's start."""
MOST_WORKERS = 8
ORDERS = (*(1 + tenths / 10 for tenths in range(1, 100)), *range(12, 64))
"""The Renyi orders of Opacus's accountant."""


@dataclass(frozen=True)
class Question:
    """Hold what is asked about one site, with its events merged.

    Equal questions are answered once.
    """

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
    """Hold the epsilons of one site, which are infinite where nothing is bounded."""

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
    """Answer questions about epsilon, in worker processes when many are expected.

    The object is a context manager. Its worker processes start as soon as it is made, while the sources are
    read.
    """

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
        """Return the answer to each distinct question.

        Args:
            questions: one per site, where equal ones are answered once.
            meanwhile: called once, while the workers compute.

        Returns:
            The answers by question.
        """
        distinct = list(dict.fromkeys(questions))
        if self._pool is not None:
            answers = self._pool.map(answer, distinct)
            meanwhile()
        else:
            meanwhile()
            answers = map(answer, distinct)
        # Computed while the workers answer: a pool's map has started, and its results are read below.
        second = [_second_opinion(question) for question in distinct]
        return {q: replace(a, opacus_rdp=rdp) for q, a, rdp in zip(distinct, answers, second, strict=True)}


def _load() -> None:
    """Import what a worker will need, by asking a small question."""
    spent((PoissonGaussian(sample_rate=1.0, noise_multiplier=9.0, steps=1),), 0.5, Adjacency.ADD_REMOVE)


def answer(question: Question) -> Answer:
    """Return all figures of a question by the accountant of record."""
    events, delta = question.events, question.delta
    whole = spent(events, delta, Adjacency.REPLACE_ONE)
    # Asked before the other figures, because the accountant caches only the newest few distributions and the
    # curve reads the one that `spent` composed just now.
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
    """Return the epsilon of the training steps by ``accounting.opacus_rdp``, or None where there is none."""
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
    return releases + _gaussian_epsilon(distance, delta)


def _gaussian_epsilon(distance: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian mechanism that moves by ``distance`` standard deviations."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def over(epsilon: float) -> float:
        first = ndtr(distance / 2 - epsilon / distance)
        # In logarithms, because exp(epsilon) overflows where ndtr is almost 0.
        second = math.exp(epsilon + log_ndtr(-distance / 2 - epsilon / distance))
        return float(first - second - delta)

    if over(0) <= 0:
        return 0.0
    highest = distance**2 / 2 + distance * math.sqrt(2 * math.log(1 / delta))
    return float(brentq(over, 0, highest, xtol=1e-9))


def disclosures(told: Told) -> tuple[Disclosure, ...]:
    """Return the seventeen disclosures, in the order in which the page shows them."""
    return tuple(
        Disclosure(key=key, title=title, text=tuple(write(told))) for key, title, write in _DISCLOSURES
    )


def _epsilon(told: Told) -> list[str]:
    return [
        "Epsilon and delta of each site, for the unit and adjacency named beside them. The curves with each "
        "site show the same spending read at other deltas; a single pair says less."
    ]


def _unit(told: Told) -> list[str]:
    units = sorted({site.unit for site in told.sites})
    return [
        *(f"The unit is the {unit}: {UNITS[unit]}." for unit in units),
        "An image lies in exactly one bag. A bag's gradient is clipped as a whole, because the loss of a bag "
        "couples its images. A person whose images are in k bags has the k-fold group guarantee.",
    ]


def _adjacency(told: Told) -> list[str]:
    return [
        "Budgets are kept for replace-one: two data sets are neighbours when one unit is replaced by "
        "another. Replacing moves the clipped sum by up to twice the clip norm.",
        "The figures for add/remove (one unit more or less), which many tools print, are smaller for the "
        "same noise and protect less. They stand beside for comparison, by two accountants.",
    ]


def _trust(told: Told) -> list[str]:
    return [
        "Noise is added at each site before anything is sent. The guarantee holds against the server, the "
        "other sites, whoever reads the network, and everybody who gets the model. It does not hold against "
        "somebody inside the site, who has the images themselves.",
        "It assumes that the site runs this software unchanged, and that its random numbers stay secret.",
    ]


def _mechanism(told: Told) -> list[str]:
    clip = told.settings.clip_norm if told.settings else None
    at = f"norm C = {clip:g}" if clip is not None else "the clip norm C of the run (not in these records)"
    return [
        f"Bag-level DP-SGD: the gradient of each drawn bag is clipped to {at}; Gaussian noise of standard "
        "deviation sigma times C is added to the sum; the sum is divided by the expected number of bags q N, "
        "never by the number that was drawn.",
    ]


def _sampling(told: Told) -> list[str]:
    return [
        "Assumed and implemented alike: Poisson sampling. In each step each bag is drawn on its own with "
        "chance q. A step in which no bag was drawn adds noise and counts like the others. No amplification "
        "is claimed from the server's choice of sites.",
    ]


def _accountant(told: Told) -> list[str]:
    packages = told.provenance.packages
    return [
        f"Of record: privacy loss distributions of dp-accounting {packages['dp-accounting']}, rounded "
        "upwards, so that every epsilon is an upper bound. Training and releases are composed by it "
        "together.",
        f"As a second opinion for add/remove: the Renyi accountant of Opacus {packages['opacus']}. It cannot "
        "hold a release of counts, so its figure is of the training steps alone.",
    ]


def _scope(told: Told) -> list[str]:
    ledgers = [site.name for site in told.sites if site.ledger is not None]
    rest = [site.name for site in told.sites if site.ledger is None]
    text = []
    if ledgers:
        text.append(
            f"From the ledger ({listed(ledgers)}): all runs, all data versions, and every round that was "
            "reserved, also those that broke off, were tried again or were never used by the server."
        )
    if rest:
        text.append(
            f"From the last statement that the server received ({listed(rest)}): the site's whole ledger at "
            "that time. A round that broke off later is only in the site's ledger."
        )
    lost = [site.name for site in told.sites if site.losses]
    if lost:
        text.append(
            f"Rows of the ledger were lost, and the site's owner accepted that ({listed(lost)}): what the "
            "site's second record said of them counts here; what happened beside that record is not known."
        )
    return text


def _released(told: Told) -> list[str]:
    looked = [site.name for site in told.sites if site.looks]
    return [
        "In each round the trained parameters of the model. Once per data version, where the site's policy "
        "allows it, counts of labels with noise; the same noisy counts are sent again when asked again.",
        *(
            [
                f"Noised figures of held-back bags ({listed(looked)}): sums of distances between predicted "
                "and true proportions, one a level and look, paid from the same budget. Each is charged as "
                "twice what it costs, so that the accountant needs no further kind of event."
            ]
            if looked
            else []
        ),
    ]


def _not_covered(told: Told) -> list[str]:
    return ["The figures say nothing about:"]


def _generator(told: Told) -> list[str]:
    names = list(dict.fromkeys(name for site in told.sites for name in site.generators))
    if not names:
        return ["No noise was drawn, so no generator was used."]
    return [
        "What sampling and noise were drawn from, as each site recorded it with every charge in its ledger.",
        *(f"{name} ({listed([s.name for s in told.sites if name in s.generators])})." for name in names),
    ]


def _delta(told: Told) -> list[str]:
    return [
        "Delta must stay below one in the number of bags. Without amplification: epsilon had every bag been "
        "in every step, which is what would be left of the claim if the draws were known; closed form for "
        "the Gaussian steps (Balle and Wang 2018), releases added.",
    ]


def _limit(told: Told) -> list[str]:
    refused = sum(len(site.refusals) for site in told.sites)
    happened = (
        f"{refused} request(s) were refused before any training, and cost nothing."
        if refused
        else "No request was refused."
    )
    return [
        "The cap is the site's own, and no server can raise it. A round is reserved in the ledger before it "
        f"starts and counts from then on, finished or not. {happened}",
    ]


def _per_site(told: Told) -> list[str]:
    if told.worst is None:
        return ["There is no figure for the federation, because not every site has one."]
    return [
        f"The federation's figure is that of its worst site, {told.worst.site}: never a mean, because a mean "
        "protects nobody. Each site's figures are below."
    ]


def _provenance(told: Told) -> list[str]:
    return [
        "The code is what the run's server recorded when the run ended. A data version is a hash over a "
        "site's tables and the sizes and times of its images. The packages are those of the machine that "
        "wrote this report."
    ]


def _audit(told: Told) -> list[str]:
    if told.audit is None:
        return ["None. No attack was tried on this run; the figures rest on the mathematics and the tests."]
    audit = told.audit
    return [
        f"An attack on the real training showed that epsilon is at least {audit.lower_bound:.4g}, with "
        f"confidence {100 * audit.confidence:g} %. A correct guarantee lies at or above that."
    ]


def _plain(told: Told) -> list[str]:
    return list(summary(told))


_DISCLOSURES: tuple[tuple[str, str, Callable[[Told], list[str]]], ...] = (
    ("epsilon", "Epsilon, delta and the curve", _epsilon),
    ("unit", "Unit, and what one unit contributes", _unit),
    ("adjacency", "Adjacency", _adjacency),
    ("trust", "Trust model", _trust),
    ("mechanism", "Mechanism, noise, clipping and normalisation", _mechanism),
    ("sampling", "Sampling, steps and rounds", _sampling),
    ("accountant", "Accountant and version", _accountant),
    ("scope", "Scope of composition", _scope),
    ("released", "What was released", _released),
    ("not-covered", "What is not covered", _not_covered),
    ("generator", "Random generator", _generator),
    ("delta", "Delta against the number of bags, and no amplification", _delta),
    ("limit", "Limit, spent, left, and what happened at the limit", _limit),
    ("per-site", "Per site, and the federation's worst", _per_site),
    ("provenance", "Provenance", _provenance),
    ("audit", "Empirical audit", _audit),
    ("plain", "In plain words", _plain),
)
