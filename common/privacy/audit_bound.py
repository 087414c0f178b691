"""A lower bound on epsilon from guesses about canaries in ONE training run. Pure maths.

Steinke, Nasr & Jagielski 2023, 'Privacy Auditing with One (1) Training Run' (arXiv 2305.08846). Each of m
canaries is included or not by a fair coin of its own; the auditor guesses r coins, abstains from the
rest, and v guesses are right. Under (epsilon, delta)-DP for adding or removing a canary, Corollary 5.4
bounds the chance of that many right guesses; an epsilon under which it is too small is refuted.

Unit: one canary, here a bag. Adjacency: add/remove. Knows nothing of models, scores or training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

BISECTIONS = 40
MOST_CANARIES = 10**6


@dataclass(frozen=True)
class Bound:
    """What was guessed, and what it proves."""

    guesses: int
    correct: int
    lower_bound: float
    """Epsilon (add/remove) is above this, up to the stated chance of error."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that P[at least ``correct`` right guesses] can be under (epsilon, delta)-DP.

    Corollary 5.4: with B ~ Binomial(r, e^eps / (1 + e^eps)),
    P[B >= v] + 2 m delta max_i P[v - i <= B < v] / i.

    Args:
        canaries: m, all of them, those that no guess was made about included.
        guesses: r, at most m.
        correct: v, at most r.
        epsilon: of the hypothesis, >= 0.
        delta: of the hypothesis.
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
    """The largest epsilon that ``correct`` right guesses refute; 0 where they refute nothing.

    Whatever the mechanism, the result is above its epsilon (add/remove, at ``delta``) with chance at most
    1 - ``confidence``. The number of guesses must be fixed before the coins are looked at.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    error = 1 - confidence
    refuted, possible = 0.0, 1.0
    while p_value(canaries, guesses, correct, possible, delta) < error:
        refuted, possible = possible, possible + 1
    for _ in range(BISECTIONS):
        middle = (refuted + possible) / 2
        if p_value(canaries, guesses, correct, middle, delta) < error:
            refuted = middle
        else:
            possible = middle
    return refuted


def best_bound(canaries: int, looks: Sequence[tuple[int, int]], delta: float, confidence: float) -> Bound:
    """The best of several looks ``(guesses, correct)`` at one run.

    The error is shared out evenly among the looks (union bound), so that choosing the best of them keeps
    the confidence.
    """
    each = 1 - (1 - confidence) / len(looks)
    bounds = [
        Bound(guesses, correct, lower_bound(canaries, guesses, correct, delta, each))
        for guesses, correct in looks
    ]
    return max(bounds, key=lambda bound: bound.lower_bound)


def canaries_needed(epsilon: float, delta: float, confidence: float, looks: int = 1) -> int | None:
    """The fewest canaries that, all guessed right, refute ``epsilon``; None beyond a million.

    With fewer, an audit cannot fail, however broken the mechanism. At epsilon 8 it takes about 9000.
    """
    error = (1 - confidence) / looks

    def refutes(number: int) -> bool:
        return p_value(number, number, number, epsilon, delta) < error

    enough = 1
    while not refutes(enough):
        enough *= 2
        if enough > MOST_CANARIES:
            return None
    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if refutes(middle) else (middle, enough)
    return enough
