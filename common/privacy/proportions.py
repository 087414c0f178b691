"""Release label counts privately by discrete Laplace noise, once per data version.

Only leaf counts are noised; coarser levels are their sums, so the levels agree and cost nothing more. The
mechanism: integer counts + independent noise, P(z) proportional to exp(-|z| / t), t = b * m images, where m
is what one bag can move: the size of the largest one. The guarantee is replace-one and takes the bag sizes,
and so m, as public. The noise is fine for a site total, and as large as all the counts of a single bag.

The ledger stores a release and charges for it, because noise drawn twice for the same data averages out.

Noise the evaluations on held-back bags that leave a site in a private run.

An evaluation answers, for each level of the label tree, with the sum over a site's held-back bags of the
total-variation distance between predicted and true proportions, which is half of the L1 distance, in [0,
1]. Each bag's distance is rounded to a whole number of ``GRID`` steps, so that replacing a bag moves the
sum by at most ``GRID``, and discrete Laplace noise of scale b * GRID is added to it. That is a (1 / b)-DP
mechanism for one level. It is charged as one ``DiscreteLaplace(scale=b)``, which the accountant takes for
TWO shifts of 1 / b: twice what it costs, so that no third kind of event is needed. Levels and evaluations
compose.

The number of held-back bags is public. The plan and the ledger decide which evaluations take place.
"""

from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from common.privacy.events import UNIT, DiscreteLaplace
from common.privacy.randomness import Generator, Purpose, Randomness, Stream


class Granularity(StrEnum):
    """Choose the bags over which counts are summed before they are noised."""

    TOTAL = "total"
    """All bags of the site: one row."""
    PER_BAG = "per-bag"
    """Nothing: one row a bag. The bags compose in parallel."""


class CountRelease(BaseModel):
    """Hold noised leaf counts, which are unbiased and may be negative, and their cost."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    granularity: Granularity
    counts: tuple[tuple[int, ...], ...] = Field(description="shape (1 or bags, C_L), images")
    unit: Literal["bag"] = Field(UNIT, description="the unit that the noise was scaled for")
    scale: float = Field(gt=0, description="b: noise scale / images that one bag can move")
    largest_bag: int = Field(ge=1, description="images in the largest bag; public")

    @property
    def noise_scale(self) -> float:
        """Return t in images.

        The standard deviation of each count's noise is about sqrt(2) * t.
        """
        return self.scale * self.largest_bag

    @property
    def event(self) -> DiscreteLaplace:
        """Return the event that the release is."""
        return DiscreteLaplace(scale=self.scale)

    def array(self) -> NDArray[np.int64]:
        """Return the counts, shape (1 or bags, C_L)."""
        return np.array(self.counts, dtype=np.int64)


def release_counts(
    leaf_counts: NDArray[np.int64],
    *,
    scale: float,
    granularity: Granularity = Granularity.TOTAL,
    randomness: Randomness,
) -> CountRelease:
    """Add noise to the leaf counts of a site.

    Args:
        leaf_counts: shape (B, C_L), images of each leaf in each bag.
        scale: b > 0, relative to the largest bag; alone it costs epsilon 2 / b for replace-one, delta 0.
        granularity: one row for the site, or one a bag.
        randomness: with a secure one, OpenDP's exact sampler and its own generator draw the noise; a seeded
            one gives repeatable noise for simulations (floating point, no guarantee).

    Raises:
        ValueError: the counts have another shape or are empty.
    """
    if leaf_counts.ndim != 2 or not leaf_counts.size:
        raise ValueError(f"leaf counts of shape (bags, leaves) expected, got {leaf_counts.shape}")
    empty = CountRelease(
        granularity=granularity,
        counts=(),
        scale=float(scale),
        largest_bag=int(leaf_counts.sum(axis=1).max()),
    )
    exact = leaf_counts if granularity is Granularity.PER_BAG else leaf_counts.sum(axis=0, keepdims=True)
    # Only the leaves are noised. Noise on each level would cost again, and the levels would contradict each
    # other.
    noisy = _discrete_laplace(exact, empty.noise_scale, randomness, Purpose.PROPORTIONS, 0)
    return empty.model_copy(update={"counts": tuple(tuple(row) for row in noisy.tolist())})


def noise_generator(randomness: Randomness) -> Generator:
    """Return the generator that draws the discrete Laplace noise under this randomness."""
    # OpenDP draws from a generator of its own, so the report must name it and not the run's.
    return Generator.OPENDP if randomness.secure else randomness.description


def _discrete_laplace(
    exact: NDArray[np.int64], noise_scale: float, randomness: Randomness, purpose: Purpose, round: int
) -> NDArray[np.int64]:
    """Add independent noise, P(z) proportional to exp(-|z| / noise_scale), to whole numbers of any shape.

    OpenDP's exact sampler draws it under a secure randomness, else the seeded stream of purpose and round.
    """
    # Noise computed in floating point leaves gaps between its values that tell the exact count (Mironov
    # 2012); OpenDP samples whole numbers exactly.
    if randomness.secure:
        return _opendp(exact, noise_scale)
    noise = _seeded_noise(randomness.stream(purpose, round), exact.size, noise_scale)
    return exact + noise.reshape(exact.shape)


def _seeded_noise(stream: Stream, number: int, noise_scale: float) -> NDArray[np.int64]:
    """Draw discrete Laplace numbers, shape (number,), as differences of two geometric ones."""
    uniform = ((stream.words(2 * number) >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
    geometric = np.floor(np.log(uniform) * -noise_scale).astype(np.int64)
    return np.asarray(geometric[:number] - geometric[number:])


def _opendp(exact: NDArray[np.int64], noise_scale: float) -> NDArray[np.int64]:
    import opendp.prelude as dp

    dp.enable_features("contrib")  # OpenDP's name for all that is not proven line by line
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    mechanism = dp.m.make_laplace(*space, scale=noise_scale)
    return np.array(mechanism(exact.ravel().tolist()), dtype=np.int64).reshape(exact.shape)


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
    return _discrete_laplace(sums, scale * GRID, randomness, Purpose.METRICS, round)
