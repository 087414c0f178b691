"""The release of counts: its noise, its unit, and that its event claims no more than the mechanism keeps."""

import json
import math

import numpy as np
import opendp.prelude as dp
import pytest

from common.privacy.accounting import spent
from common.privacy.events import Adjacency
from common.privacy.proportions import (
    CountRelease,
    Granularity,
    _seeded_noise,
    release_counts,
)
from common.privacy.randomness import (
    InsecureSeededRandomness,
    Purpose,
    Randomness,
    SecureRandomness,
)

COUNTS = np.array([[4, 0, 2], [1, 1, 1], [0, 5, 3]])
SEEDED = InsecureSeededRandomness(1, "site-1")


def check_noise(noise: np.ndarray, scale: float) -> None:
    """Discrete Laplace: P(z) = (1 - a) / (1 + a) a^|z| with a = exp(-1 / scale)."""
    a = math.exp(-1 / scale)
    assert noise.var() == pytest.approx(2 * a / (1 - a) ** 2, rel=0.1)
    assert np.mean(noise == 0) == pytest.approx((1 - a) / (1 + a), rel=0.1)
    assert np.mean(noise > 0) == pytest.approx(np.mean(noise < 0), abs=0.03)


@pytest.mark.parametrize("source", [SecureRandomness(), SEEDED])
def test_noise_is_scaled_to_the_largest_bag(source: Randomness) -> None:
    exact = np.tile(COUNTS, (3000, 1))
    release = release_counts(exact, scale=1.5, granularity=Granularity.PER_BAG, randomness=source)
    assert release.noise_scale == 1.5 * 8
    check_noise(release.array() - exact, 1.5 * 8)
    assert release.event.scale == 1.5


def test_planted_bug_half_noise() -> None:
    noise = _seeded_noise(SEEDED.stream(Purpose.NOISE, 9), 20_000, 1.5)
    with pytest.raises(AssertionError):
        check_noise(noise, 3.0)


def test_the_site_total_is_one_row_and_bags_are_one_each() -> None:
    total = release_counts(COUNTS, scale=1e-6, randomness=SEEDED)
    assert total.array().tolist() == [COUNTS.sum(axis=0).tolist()]
    per_bag = release_counts(COUNTS, scale=1e-6, granularity=Granularity.PER_BAG, randomness=SEEDED)
    assert per_bag.array().tolist() == COUNTS.tolist()


def test_the_event_claims_no_more_than_opendp_proves() -> None:
    """A replaced bag of m images moves the counts by up to 2 m."""
    release = release_counts(COUNTS, scale=2.0, randomness=SEEDED)
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    dp.enable_features("contrib")
    proven = dp.m.make_laplace(*space, scale=release.noise_scale)
    claimed = spent([release.event], 1e-12, Adjacency.REPLACE_ONE)
    assert claimed >= proven.map(2 * 8) * (1 - 1e-6)


def test_planted_bug_noise_for_an_image_sold_as_noise_for_a_bag() -> None:
    """Noise of scale 2 hides one image of a bag of 8; a bag as a whole costs epsilon 8 there, and not 1."""
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    proven = dp.m.make_laplace(*space, scale=2.0).map(2 * 8)
    assert proven == pytest.approx(8.0)
    lie = release_counts(COUNTS, scale=2.0, randomness=SEEDED).model_copy(update={"largest_bag": 1})
    assert lie.noise_scale == 2.0
    with pytest.raises(AssertionError):
        assert spent([lie.event], 1e-12, Adjacency.REPLACE_ONE) >= proven * (1 - 1e-6)


def test_by_the_exact_distribution_no_shift_of_a_bag_costs_more_than_accounted() -> None:
    """Hockey-stick divergence summed over the whole output, for the ways m = 3 images can move."""
    m, b, epsilon = 3, 1.7, 0.6
    z = np.arange(-150, 151)
    a = math.exp(-1 / (b * m))

    def shifted(by: int) -> np.ndarray:
        return (1 - a) / (1 + a) * a ** np.abs(z - by)

    from tests.reference_accounting import delta_at

    claimed = delta_at(
        [CountRelease(granularity=Granularity.TOTAL, counts=(), scale=b, largest_bag=m).event],
        epsilon,
        Adjacency.REPLACE_ONE,
    )
    for joins, leaves in ((3, -3), (2, -3), (1, -1)):
        p = np.multiply.outer(shifted(0), shifted(0))
        q = np.multiply.outer(shifted(joins), shifted(leaves))
        assert np.maximum(p - math.exp(epsilon) * q, 0).sum() <= claimed + 1e-12
    assert claimed < 0.2


def test_a_release_survives_json() -> None:
    release = release_counts(COUNTS, scale=0.3, randomness=SEEDED)
    assert CountRelease.model_validate_json(json.dumps(release.model_dump(mode="json"))) == release
    assert release.event.scale == 0.3


def test_seeded_releases_repeat_and_secure_ones_do_not() -> None:
    seeded = [
        release_counts(COUNTS, scale=9.0, randomness=InsecureSeededRandomness(1, "a")).counts for _ in "12"
    ]
    secure = [release_counts(COUNTS, scale=99.0, randomness=SecureRandomness()).counts for _ in "12"]
    assert seeded[0] == seeded[1]
    assert secure[0] != secure[1]


def test_counts_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="bags, leaves"):
        release_counts(COUNTS[0], scale=1.0, randomness=SEEDED)
