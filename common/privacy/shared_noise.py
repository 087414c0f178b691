"""Draw a site's share of a noise that all sites of a sum add up to, on the grid of secure aggregation.

Under secure aggregation only the sum of the sites' vectors is ever seen, so the noise may be in the sum: each
of k sites adds a discrete Gaussian share of variance s^2 / k (Kairouz et al. 2021, "The Distributed Discrete
Gaussian Mechanism for Federated Learning with Secure Aggregation"). More sites than k add more noise.

Exactly: a bag's clipped gradient has norm at most C, which is g steps of the grid. Each coordinate of a
site's sum is rounded to the nearest step, which moves two sums apart by at most sqrt(n) more, n being their
numbers. So with s = sigma (g + sqrt(n)) the sum of whole numbers has the sensitivity that sigma was found
for. Three differences to a continuous Gaussian of the same s are left:

- a sum of k discrete Gaussians is one of s^2 up to a factor of exp(10 k exp(-pi^2 s^2 / k)), which no float64
  tells from 1 at s >= 1000 sqrt(k);
- a discrete Gaussian has the probabilities of a rounded continuous one, a post-processing and so no less
  private, up to a factor of exp((t^2 + 1) / (20 s^2)) within t standard deviations, by the expansion of the
  integral over one step; outside of t = 10 there is less than 2e-23 of the mass;
- in n numbers, there and back, this is exp(2 n 101 / (20 s^2)), at most exp(1e-5) where s >= 1005 sqrt(n).

The last is asked of every plan (``grid_is_fine``), and the accountant adds 1e-5 to epsilon for every such
step.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.privacy.events import GRID_COST
from common.privacy.randomness import Purpose, Randomness

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_STANDARD_DEVIATION = 1000.0


def sum_deviation(noise_multiplier: float, steps_of_clip_norm: float, numbers: int) -> float:
    """Return s, the standard deviation of the noise in the sum, in steps of the grid.

    Args:
        noise_multiplier: sigma that was accounted for, relative to the clip norm.
        steps_of_clip_norm: g.
        numbers: n, of the vector.
    """
    return noise_multiplier * (steps_of_clip_norm + math.sqrt(numbers))


def grid_is_fine(deviation: float, numbers: int, shares: int) -> bool:
    """Return True if a step on the grid costs at most ``events.GRID_COST`` more than a continuous one.

    Args:
        deviation: s.
        numbers: n.
        shares: k.
    """
    cost = 2 * numbers * 101 / (20 * deviation**2) if deviation else math.inf
    return cost <= GRID_COST and deviation >= _LEAST_STANDARD_DEVIATION * math.sqrt(shares)


def to_steps(values: NDArray[np.float64], steps_per_unit: float) -> NDArray[np.int64]:
    """Round to the nearest step of the grid; what is not finite counts as 0."""
    return np.rint(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) * steps_per_unit).astype(np.int64)


def share(shape: "Sequence[int]", deviation: float, randomness: Randomness, round: int) -> NDArray[np.int64]:
    """Return a site's share of the noise, whole numbers of any shape.

    Args:
        shape: of the numbers.
        deviation: of the share, s / sqrt(k).
        randomness: with a secure one, OpenDP's exact sampler and its own generator draw the noise; a seeded
            one gives repeatable noise for simulations (rounded floating point, no guarantee).
        round: a seeded generator has numbers of its own for every round.
    """
    number = math.prod(shape)
    if randomness.secure:
        import opendp.prelude as dp

        dp.enable_features("contrib")  # OpenDP's name for all that is not proven line by line
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
        drawn = dp.m.make_gaussian(*space, scale=deviation)([0] * number)
        return np.array(drawn, dtype=np.int64).reshape(shape)
    import torch

    noise = torch.zeros(number)
    randomness.stream(Purpose.NOISE, round).add_normals(noise, 1.0)
    return np.rint(noise.double().numpy() * deviation).astype(np.int64).reshape(shape)
