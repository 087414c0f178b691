"""The release of counts: its noise, its unit, and that its event claims no more than the mechanism keeps."""

import json
import math

import numpy as np
import opendp.prelude as dp
import pytest

from common.privacy.accounting import spent
from common.privacy.events import Adjacency, Unit
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
@pytest.mark.parametrize(("unit", "images"), [(Unit.BAG, 8), (Unit.IMAGE, 1)])
def test_noise_is_scaled_to_the_unit(source: Randomness, unit: Unit, images: int) -> None:
    exact = np.tile(COUNTS, (3000, 1))
    release = release_counts(exact, scale=1.5, unit=unit, granularity=Granularity.PER_BAG, randomness=source)
    assert release.noise_scale == 1.5 * images
    check_noise(release.array() - exact, 1.5 * images)
    assert release.event(unit).scale == 1.5


def test_planted_bug_half_noise() -> None:
    noise = _seeded_noise(SEEDED.stream(Purpose.NOISE, 9), 20_000, 1.5)
    with pytest.raises(AssertionError):
        check_noise(noise, 3.0)


def test_the_site_total_is_one_row_and_bags_are_one_each() -> None:
    total = release_counts(COUNTS, scale=1e-6, unit=Unit.IMAGE, randomness=SEEDED)
    assert total.array().tolist() == [COUNTS.sum(axis=0).tolist()]
    per_bag = release_counts(
        COUNTS, scale=1e-6, unit=Unit.IMAGE, granularity=Granularity.PER_BAG, randomness=SEEDED
    )
    assert per_bag.array().tolist() == COUNTS.tolist()


def test_the_event_claims_no_more_than_opendp_proves() -> None:
    """A replaced bag of m images moves the counts by up to 2 m; a replaced image by 2."""
    release = release_counts(COUNTS, scale=2.0, randomness=SEEDED)
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    dp.enable_features("contrib")
    proven = dp.m.make_laplace(*space, scale=release.noise_scale)
    for unit, moved in ((Unit.BAG, 2 * 8), (Unit.IMAGE, 2)):
        claimed = spent([release.event(unit)], 1e-12, Adjacency.REPLACE_ONE)
        assert claimed >= proven.map(moved) * (1 - 1e-6)


def test_planted_bug_noise_for_an_image_sold_as_noise_for_a_bag() -> None:
    release = release_counts(COUNTS, scale=2.0, unit=Unit.IMAGE, randomness=SEEDED)
    lie = release.model_copy(update={"unit": Unit.BAG, "largest_bag": 1})
    honest = spent([release.event(Unit.BAG)], 1e-12, Adjacency.REPLACE_ONE)
    assert honest == pytest.approx(2 * 8 / 2.0, rel=0.01)
    with pytest.raises(AssertionError):
        assert spent([lie.event(Unit.BAG)], 1e-12, Adjacency.REPLACE_ONE) >= honest * (1 - 1e-6)


def test_by_the_exact_distribution_no_shift_of_a_bag_costs_more_than_accounted() -> None:
    """Hockey-stick divergence summed over the whole output, for the ways m = 3 images can move."""
    m, b, epsilon = 3, 1.7, 0.6
    z = np.arange(-150, 151)
    a = math.exp(-1 / (b * m))

    def shifted(by: int) -> np.ndarray:
        return (1 - a) / (1 + a) * a ** np.abs(z - by)

    from tests.reference_accounting import delta_at

    claimed = delta_at(
        [
            CountRelease(
                granularity=Granularity.TOTAL, counts=(), unit=Unit.BAG, scale=b, largest_bag=m
            ).event(Unit.BAG)
        ],
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
    assert release.event(Unit.BAG).scale == 0.3


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
