"""Invariants of dividing: nothing lost, nothing twice, units whole, sizes as promised."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deploy.datasets.partition import (
    Indices,
    _feed_poorest,
    _fill_bags_by_value,
    _order_by_similarity,
    _partition_dirichlet,
    _partition_iid,
    _spread_like,
    fill_bags,
    units_of,
)

unit_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=60)


def make_units(sizes: list[int]) -> list[Indices]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def check_bags(bags: list[Indices], units: list[Indices], minimum: int) -> None:
    """Every image once, every unit in one bag, at most one bag (of all) below the minimum."""
    assert sorted(np.concatenate(bags).tolist()) == list(range(sum(map(len, units))))
    members = [set(bag.tolist()) for bag in bags]
    for unit in units:
        assert sum(not bag.isdisjoint(unit.tolist()) for bag in members) == 1
    assert len(bags) == 1 or min(map(len, bags)) >= minimum


@given(sizes=unit_sizes, bag_size=st.integers(4, 16), minimum=st.integers(1, 4))
def test_bags_hold_whole_units_and_the_promised_number(sizes: list[int], bag_size: int, minimum: int) -> None:
    units = make_units(sizes)
    bags = fill_bags(units, bag_size, minimum)
    check_bags(bags, units, minimum)
    largest = max([2 * bag_size - 2 + minimum, *(size + minimum for size in sizes)])
    assert max(map(len, bags)) <= largest


@given(images=st.integers(1, 200), bag_size=st.integers(4, 16))
def test_single_images_fill_bags_exactly(images: int, bag_size: int) -> None:
    sizes = [len(bag) for bag in fill_bags(make_units([1] * images), bag_size, 4)]
    assert all(size == bag_size for size in sizes[:-1])
    assert sizes[-1] < bag_size + 4


@given(sizes=unit_sizes, bag_size=st.integers(4, 16), values=st.integers(1, 8))
def test_bags_by_value_mix_values_only_where_they_are_too_few(
    sizes: list[int], bag_size: int, values: int
) -> None:
    units = make_units(sizes)
    cells = [""] * sum(sizes)
    for number, unit in enumerate(units):
        for index in unit:
            cells[index] = str(number % values)
    bags = _fill_bags_by_value(units, cells, bag_size, 4)
    check_bags(bags, units, 4)
    poor = {value for value in set(cells) if cells.count(value) < 4}
    for bag in bags:
        rich = {cells[index] for index in bag} - poor
        assert len(rich) <= 1


@given(sizes=unit_sizes, sites=st.integers(1, 6), seed=st.integers(0, 99))
def test_iid_shares_images_evenly_as_far_as_units_allow(sizes: list[int], sites: int, seed: int) -> None:
    units = make_units(sizes)
    site_of = _partition_iid(units, sites, np.random.default_rng(seed))
    assert set(site_of) <= set(range(sites))
    images = np.bincount(site_of, weights=sizes, minlength=sites)
    assert images.max() - images.min() <= 2 * max(sizes)


@given(
    images=st.integers(40, 400),
    sites=st.integers(1, 5),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_dirichlet_gives_every_site_its_fewest(images: int, sites: int, alpha: float, seed: int) -> None:
    labels = np.arange(images) % 7
    fewest = images // (2 * sites)
    rng = np.random.default_rng(seed)
    units = units_of(np.arange(images), None)
    site_of = _partition_dirichlet(units, labels, sites, alpha, rng)
    _feed_poorest(units, site_of, sites, fewest, rng)
    assert np.bincount(site_of, minlength=sites).min() >= fewest
    rng = np.random.default_rng(seed)
    again = _feed_poorest(units, _partition_dirichlet(units, labels, sites, alpha, rng), sites, fewest, rng)
    assert np.array_equal(site_of, again)


def test_small_alpha_makes_uneven_mixes_and_large_alpha_even_ones() -> None:
    labels = np.arange(2000) % 4
    units = units_of(np.arange(2000), None)
    spread = []
    for alpha in (0.1, 1000):
        site_of = _partition_dirichlet(units, labels, 5, alpha, np.random.default_rng(0))
        table = np.stack([np.bincount(site_of[labels == leaf], minlength=5) for leaf in range(4)])
        spread.append(table.std())
    assert spread[0] > 10 * spread[1]


def test_test_images_follow_the_mix_of_the_training_images() -> None:
    counts = np.array([[90, 0, 0], [10, 50, 0]])
    labels = np.repeat([0, 1, 2], 100)
    site_of = _spread_like(np.arange(300), labels, counts, np.random.default_rng(0))
    assert np.bincount(site_of[labels == 0], minlength=2).tolist() == [90, 10]
    assert np.bincount(site_of[labels == 1], minlength=2).tolist() == [0, 100]
    assert np.bincount(site_of[labels == 2], minlength=2).tolist() == [50, 50], "no site trains on it"


def test_units_keep_groups_together_in_order_of_appearance() -> None:
    units = units_of(np.array([4, 1, 3, 0]), ["a", "b", "a", "b", "a"])
    assert [unit.tolist() for unit in units] == [[4, 0], [1, 3]]


@given(points=st.integers(1, 150), bag_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_order_by_similarity_is_a_permutation(points: int, bag_size: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(points, 3))
    order = _order_by_similarity(features, bag_size)
    assert sorted(order.tolist()) == list(range(points))


def test_order_by_similarity_puts_like_with_like() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(np.arange(4), 16))
    features = rng.normal(size=(4, 5))[cluster] * 10 + rng.normal(size=(64, 5)) * 0.1
    order = _order_by_similarity(features, 16)
    assert all(len(set(cluster[order[start : start + 16]])) == 1 for start in range(0, 64, 16))
