"""Noise the evaluations on held-back bags that leave a site in a private run.

An evaluation answers, for each level of the label tree, with the sum over a site's held-back bags of the
total-variation distance between predicted and true proportions, which is half of the L1 distance, in [0,
1]. Each bag's distance is rounded to a whole number of ``GRID`` steps, so that replacing a bag moves the
sum by at most ``GRID``, and discrete Laplace noise of scale b * GRID is added to it. That is a (1 / b)-DP
mechanism for one level. It is charged as one ``DiscreteLaplace(scale=b)``, which the accountant takes for
TWO shifts of 1 / b: twice what it costs, so that no third kind of event is needed. Levels and evaluations
compose.

The number of held-back bags is public. The plan and the ledger decide which evaluations take place.
"""

import numpy as np
from numpy.typing import NDArray

from common.privacy.proportions import discrete_laplace
from common.privacy.randomness import Purpose, Randomness

GRID = 1000
"""Steps that a total-variation distance of 1 is divided into."""


def to_grid(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round distances to whole steps in [0, GRID].

    Args:
        distances: any shape, in [0, 1]. NaN, as a diverged model gives, counts as 1.
    """
    # An error for NaN would reveal something of a bag that no noise covers.
    bounded = np.clip(np.nan_to_num(distances, nan=1.0), 0.0, 1.0)
    return np.rint(bounded * GRID).astype(np.int64)


def noised(sums: NDArray[np.int64], scale: float, randomness: Randomness, round: int) -> NDArray[np.int64]:
    """Add noise to sums of distances so that they may leave the site.

    Args:
        sums: shape (levels,), steps.
        scale: b of the event that was charged for each level.
        randomness: with a secure one, OpenDP draws the noise by its exact sampler.
        round: a seeded generator has numbers of its own for every round.

    Returns:
        Same shape, steps; unbiased, may be negative.
    """
    return discrete_laplace(sums, scale * GRID, randomness, Purpose.METRICS, round)
