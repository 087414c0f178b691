"""Compute the progress of a run and the decay of its learning rate from round numbers."""

import math

FLOOR = 0.05
"""Share of its start that a learning rate ends at."""


def run_progress(round: int, rounds: int) -> float:
    """Return the share of the run that is done when ``round`` (1-based) starts.

    It is 0 in the first round and 1 in the last.
    """
    return (round - 1) / max(rounds - 1, 1)


def cosine_decay(progress: float) -> float:
    """Return the factor of the learning rate at ``progress`` in [0, 1].

    It falls from 1 to ``FLOOR`` along half a cosine (Loshchilov & Hutter 2017, eq. 5).
    """
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
