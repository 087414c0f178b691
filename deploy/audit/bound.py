"""Compute a lower bound on epsilon from guesses about canaries in ONE training run.

Steinke, Nasr & Jagielski 2023, 'Privacy Auditing with One (1) Training Run' (arXiv 2305.08846). Each of m
canaries is included or not by a fair coin of its own; the auditor guesses r coins, abstains from the
rest, and v guesses are right. Under (epsilon, delta)-DP for adding or removing a canary, Corollary 5.4
bounds the chance of that many right guesses; an epsilon under which it is too small is refuted.

Unit: one canary, here a bag. Adjacency: add/remove. This module knows nothing of models, scores or
training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

# Forty halvings of an interval of length 1 reach 1e-12, far below what a run can tell apart.
_BISECTIONS = 40
_MOST_CANARIES = 10**6


@dataclass(frozen=True)
class Bound:
    """Hold the outcome of the guesses and the epsilon that it proves."""

    guesses: int
    correct: int
    lower_bound: float
    """Epsilon (add/remove) is above this, up to the stated chance of error."""


def _p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the largest P[at least ``correct`` right guesses] under (epsilon, delta)-DP.

    By Corollary 5.4, with B ~ Binomial(r, e^eps / (1 + e^eps)), it is

        P[B >= v] + 2 m delta max_i P[v - i <= B < v] / i.

    Args:
        canaries: m, including those that no guess was made about.
        guesses: r, at most m.
        correct: v, at most r.
        epsilon: of the hypothesis, >= 0.
        delta: of the hypothesis, in [0, 1].

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"correct <= guesses <= canaries expected, got {correct}, {guesses}, {canaries}")
    if epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(f"epsilon >= 0 and delta in [0, 1] expected, got {epsilon} and {delta}")
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, chance))
    if not delta or not correct:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, correct + 1)).max())
    return min(tail + 2 * canaries * delta * steepest, 1.0)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that ``correct`` right guesses refute, or 0 where they refute none.

    The result is above the mechanism's epsilon (add/remove, at ``delta``) with chance at most 1 -
    ``confidence``, whatever the mechanism. The number of guesses must be fixed before the coins are
    revealed.

    Raises:
        ValueError: the confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    error = 1 - confidence
    refuted, possible = 0.0, 1.0
    while _p_value(canaries, guesses, correct, possible, delta) < error:
        refuted, possible = possible, possible + 1
    for _ in range(_BISECTIONS):
        middle = (refuted + possible) / 2
        if _p_value(canaries, guesses, correct, middle, delta) < error:
            refuted = middle
        else:
            possible = middle
    return refuted


def best_bound(canaries: int, looks: Sequence[tuple[int, int]], delta: float, confidence: float) -> Bound:
    """Return the best bound of several evaluations ``(guesses, correct)`` of one run.

    The error is shared out evenly among them (union bound), so that choosing the best keeps the confidence.
    """
    # Union bound: taking the best of several evaluations would otherwise raise the chance of error.
    each = 1 - (1 - confidence) / len(looks)
    bounds = [
        Bound(guesses, correct, lower_bound(canaries, guesses, correct, delta, each))
        for guesses, correct in looks
    ]
    return max(bounds, key=lambda bound: bound.lower_bound)


def canaries_needed(epsilon: float, delta: float, confidence: float, looks: int = 1) -> int | None:
    """Return the fewest canaries that, all guessed right, refute ``epsilon``.

    With fewer, an audit cannot fail, however broken the mechanism. At epsilon 8 it takes about 9000. The
    result is None beyond a million.
    """
    error = (1 - confidence) / looks

    def refutes(number: int) -> bool:
        return _p_value(number, number, number, epsilon, delta) < error

    enough = 1
    while not refutes(enough):
        enough *= 2
        if enough > _MOST_CANARIES:
            return None
    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if refutes(middle) else (middle, enough)
    return enough
