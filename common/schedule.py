"""How far a run is, and the learning rate's way down. Pure functions of round numbers."""

import math

FLOOR = 0.05
"""Share of its start that a learning rate ends at."""


def run_progress(round: int, rounds: int) -> float:
    """The share of a run of ``rounds`` that is done when ``round`` (1-based) starts; the last trains at 1."""
    return (round - 1) / max(rounds - 1, 1)


def cosine_decay(progress: float) -> float:
    """Factor of a learning rate: from 1 along half a cosine to FLOOR (Loshchilov & Hutter 2017, eq. 5)."""
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
