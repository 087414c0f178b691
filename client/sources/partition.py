"""Divide images into sites and bags by pure functions on indices.

The generator that is handed in fixes the result. What is moved about is a *unit*: all images of one patient
(or lesion), or a single image where no such ids exist. A unit is never divided here.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def units_of(indices: Indices, groups: Sequence[str] | None) -> list[Indices]:
    """Divide image indices into units, by group in order of first appearance, or one by one."""
    if groups is None:
        return [np.array([index]) for index in indices.tolist()]
    members: dict[str, list[int]] = {}
    for index in indices.tolist():
        members.setdefault(groups[index], []).append(index)
    return [np.array(group) for group in members.values()]


def partition_iid(units: Sequence[Indices], sites: int, rng: np.random.Generator) -> Indices:
    """Deal units to sites at random, about equally many images each, and return the site of each unit."""
    site_of = np.zeros(len(units), dtype=np.int64)
    _deal(units, np.arange(len(units)), np.full(sites, 1 / sites), site_of, rng)
    return site_of


def partition_dirichlet(
    units: Sequence[Indices],
    labels: NDArray[np.int64],
    sites: int,
    concentration: float,
    fewest: int,
    rng: np.random.Generator,
) -> Indices:
    """Deal the units of each leaf class by proportions drawn from a Dirichlet law.

    Args:
        units: image indices of each unit; a unit counts as its first image's class.
        labels: shape (N,), leaf index of every image.
        sites: number of sites.
        concentration: of the law; small gives every class to few sites, large is nearly iid.
        fewest: images that every site gets at least, moved there from the largest site, as far as
            undivided units allow; at most half an equal share.
        rng: source of randomness.

    Returns:
        Shape (units,): the site of each unit.
    """
    site_of = np.zeros(len(units), dtype=np.int64)
    classes = np.array([labels[unit[0]] for unit in units])
    for leaf in np.unique(classes):
        mix = rng.dirichlet(np.full(sites, concentration))
        _deal(units, np.flatnonzero(classes == leaf), mix, site_of, rng)
    sizes = np.array([len(unit) for unit in units])
    images = np.bincount(site_of, weights=sizes, minlength=sites)
    for _ in units:
        poorest, richest = int(images.argmin()), int(images.argmax())
        candidates = np.flatnonzero(site_of == richest)
        # A site's last unit stays with it: moving it would only make another site the poorest.
        if images[poorest] >= fewest or len(candidates) < 2:
            break
        moved = rng.choice(candidates)
        site_of[moved] = poorest
        images[richest] -= sizes[moved]
        images[poorest] += sizes[moved]
    return site_of


def spread_like(
    test: Indices,
    labels: NDArray[np.int64],
    site_counts: NDArray[np.int64],
    rng: np.random.Generator,
) -> Indices:
    """Deal test images so that every site's class mix follows that of its training images.

    Args:
        test: image indices.
        labels: shape (N,), leaf index of every image.
        site_counts: shape (sites, C_L), training images; a class that no site trains on is dealt
            equally.
        rng: source of randomness.

    Returns:
        Shape (len(test),): the site of each test image.
    """
    site_of = np.zeros(len(test), dtype=np.int64)
    units = [np.array([index]) for index in test.tolist()]
    for leaf in np.unique(labels[test]):
        weights = site_counts[:, leaf] + (0.0 if site_counts[:, leaf].any() else 1.0)
        chosen = np.flatnonzero(labels[test] == leaf)
        _deal(units, chosen, weights / weights.sum(), site_of, rng)
    return site_of


def fill_bags(units: Sequence[Indices], bag_size: int, minimum: int) -> list[Indices]:
    """Fill bags with units in the order given.

    A unit of ``bag_size`` images or more is a bag of its own. Of the others a bag takes units until it
    holds at least ``bag_size`` images (exactly that many where units are single images, at most
    ``2 * bag_size - 2`` otherwise). What is left over is a smaller bag, or joins the last bag where it
    is below ``minimum``; it is returned as it is when there is no other bag.
    """
    bags = [unit for unit in units if len(unit) >= bag_size]
    open_bag: list[Indices] = []
    held = 0
    for unit in units:
        if len(unit) >= bag_size:
            continue
        open_bag.append(unit)
        held += len(unit)
        if held >= bag_size:
            bags.append(np.concatenate(open_bag))
            open_bag, held = [], 0
    if open_bag and held < minimum and bags:
        bags[-1] = np.concatenate([bags[-1], *open_bag])
    elif open_bag:
        bags.append(np.concatenate(open_bag))
    return bags


def fill_bags_by_value(
    units: Sequence[Indices], values: Sequence[str], bag_size: int, minimum: int
) -> list[Indices]:
    """Fill bags value by value, so that a bag holds images of one value of a column.

    Values that cannot fill a bag of ``minimum`` images share bags among themselves.
    """
    by_value: dict[str, list[Indices]] = {}
    for unit in units:
        by_value.setdefault(values[unit[0]], []).append(unit)
    bags: list[Indices] = []
    poor: list[Indices] = []
    for members in by_value.values():
        if sum(len(unit) for unit in members) < minimum:
            poor += members
        else:
            bags += fill_bags(members, bag_size, minimum)
    shared = fill_bags(poor, bag_size, minimum)
    if shared and len(shared[-1]) < minimum and bags:
        bags[-1] = np.concatenate([bags[-1], shared.pop()])
    return bags + shared


def order_by_similarity(features: NDArray[np.float64], bag_size: int) -> Indices:
    """Order points so that runs of ``bag_size`` are alike.

    The set is halved across its first principal axis, then each half, down to one bag: like k-means
    with equal cluster sizes, in a fraction of the time.

    Args:
        features: shape (n, f).
        bag_size: points per run.

    Returns:
        A permutation of 0..n-1.
    """
    number = len(features)
    if number <= bag_size:
        return np.arange(number)
    centred = features - features.mean(axis=0)
    # ``eigh`` sorts its eigenvalues in ascending order, so the principal axis comes last.
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    order = np.argsort(centred @ axis, kind="stable")
    half = max(1, round(number / 2 / bag_size)) * bag_size
    halves = [order[:half], order[half:]]
    return np.concatenate([part[order_by_similarity(features[part], bag_size)] for part in halves])


def _deal(
    units: Sequence[Indices],
    chosen: Indices,
    mix: NDArray[np.float64],
    site_of: Indices,
    rng: np.random.Generator,
) -> None:
    """Write the sites of the chosen units into ``site_of``, so that shares of their images follow ``mix``."""
    order = rng.permutation(chosen)
    sizes = np.array([len(units[unit]) for unit in order], dtype=np.float64)
    middle = (np.cumsum(sizes) - sizes / 2) / max(sizes.sum(), 1)
    site_of[order] = np.minimum(np.searchsorted(np.cumsum(mix), middle), len(mix) - 1)
