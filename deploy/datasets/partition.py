"""Divide the images of a source into sites, and those of a site into bags, by pure functions on indices.

The generator that is handed in fixes the result. What is moved about is a *unit*: all images of one patient
(or lesion), or a single image where no such ids exist. A unit is never divided here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import BadRow, UserError
from deploy.datasets.files import SourceTable, thumbnail
from deploy.datasets.options import Division

Indices = NDArray[np.int64]
_BAGS_AT_LEAST = 4
"""Bags that `dirichlet` leaves to its poorest site, where there are enough images."""
_MISSING_WORDS = {"", "nan", "na", "n/a", "#n/a", "<na>", "none", "null", "nil", "nat", "missing", "unknown"}
_MISSING_WORDS |= {"-", "--", "?"}


@dataclass(frozen=True)
class Split:
    """Hold the images of a source that are in use, and the rows that are not.

    Attributes:
        train: indices of the training images.
        test: indices of the test images.
        bad: rows that were left out.
    """

    train: Indices
    test: Indices
    bad: tuple[BadRow, ...] = ()


def units_of(indices: Indices, groups: Sequence[str] | None) -> list[Indices]:
    """Divide image indices into units, by group in order of first appearance, or one by one."""
    if groups is None:
        return [np.array([index]) for index in indices.tolist()]
    members: dict[str, list[int]] = {}
    for index in indices.tolist():
        members.setdefault(groups[index], []).append(index)
    return [np.array(group) for group in members.values()]


def _partition_iid(units: Sequence[Indices], sites: int, rng: np.random.Generator) -> Indices:
    """Deal units to sites at random, about equally many images each, and return the site of each unit."""
    site_of = np.zeros(len(units), dtype=np.int64)
    _deal(units, np.arange(len(units)), np.full(sites, 1 / sites), site_of, rng)
    return site_of


def _partition_dirichlet(
    units: Sequence[Indices],
    labels: NDArray[np.int64],
    sites: int,
    concentration: float,
    rng: np.random.Generator,
) -> Indices:
    """Deal the units of each leaf class by proportions drawn from a Dirichlet law.

    Args:
        units: image indices of each unit; a unit counts as its first image's class.
        labels: shape (N,), leaf index of every image.
        sites: number of sites.
        concentration: of the law; small gives every class to few sites, large is nearly iid.
        rng: source of randomness.

    Returns:
        Shape (units,): the site of each unit.
    """
    site_of = np.zeros(len(units), dtype=np.int64)
    classes = np.array([labels[unit[0]] for unit in units])
    for leaf in np.unique(classes):
        mix = rng.dirichlet(np.full(sites, concentration))
        _deal(units, np.flatnonzero(classes == leaf), mix, site_of, rng)
    return site_of


def _feed_poorest(
    units: Sequence[Indices], site_of: Indices, sites: int, fewest: int, rng: np.random.Generator
) -> Indices:
    """Move units from the largest site to the smallest until every site has its fewest images.

    That is as far as undivided units allow; ``fewest`` is at most half an equal share. Returns ``site_of``,
    which is changed.
    """
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


def _spread_like(
    test: Indices, labels: NDArray[np.int64], site_counts: NDArray[np.int64], rng: np.random.Generator
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


def _fill_bags_by_value(
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


def _order_by_similarity(features: NDArray[np.float64], bag_size: int) -> Indices:
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
    return np.concatenate([part[_order_by_similarity(features[part], bag_size)] for part in halves])


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


def column(source: SourceTable, name: str) -> Sequence[str]:
    """Return the cells of a column.

    Raises:
        UserError: there is none of this name; the text names the columns there are.
    """
    if name not in source.columns:
        known = ", ".join(source.columns) or "none"
        raise UserError(f"{source.file} has no column {name!r}; its columns are: {known}")
    return source.columns[name]


def is_missing(cell: str) -> bool:
    """Return whether a cell stands for an unknown value, as spreadsheets and data frames write it."""
    return cell.strip().lower() in _MISSING_WORDS


def groups_of(source: SourceTable, name: str) -> list[str]:
    """Return the group of every image, with a group of its own for an image whose cell is missing."""
    return [
        f"{cell} without {name}, number {index}" if is_missing(cell) else cell
        for index, cell in enumerate(column(source, name))
    ]


def divide(
    source: SourceTable,
    split: Split,
    groups: Sequence[str] | None,
    division: Division,
    rng: np.random.Generator,
) -> tuple[list[str], list[tuple[list[Indices], Indices]]]:
    """Return the name of every site, with its training units and test images."""
    train, test = split.train, split.test
    kind, _, argument = division.partition.partition(":")
    if kind == "column" and argument:
        values = column(source, argument)
        chosen = sorted({values[index] for index in train})
        if division.sites not in (None, len(chosen)):
            raise UserError(f"--sites {division.sites}: column {argument!r} has {len(chosen)} values")
        cells = np.array(values, dtype=object)
        parts = [
            (units_of(train[cells[train] == value], groups), test[cells[test] == value]) for value in chosen
        ]
        return _site_names(chosen), parts
    number = division.number_of_sites
    if number < 1:
        raise UserError(f"--sites {number}: at least one site is needed")
    units = units_of(train, groups)
    if kind == "iid" and not argument:
        site_of = _partition_iid(units, number, rng)
    elif kind == "dirichlet":
        fewest = min(_BAGS_AT_LEAST * division.bag_size, len(train) // (2 * number))
        alpha = _concentration(argument)
        site_of = _partition_dirichlet(units, source.labels, number, alpha, rng)
        site_of = _feed_poorest(units, site_of, number, fewest, rng)
    else:
        raise UserError(f"--partition {division.partition!r}: write iid, dirichlet:ALPHA or column:NAME")
    owned = [[units[index] for index in np.flatnonzero(site_of == site)] for site in range(number)]
    none = np.zeros(0, dtype=np.int64)
    counts = np.stack(
        [
            np.bincount(source.labels[np.concatenate([none, *own])], minlength=source.hierarchy.sizes[-1])
            for own in owned
        ]
    )
    test_site = _spread_like(test, source.labels, counts, rng)
    width = len(str(number))
    names = [f"site-{site:0{width}d}" for site in range(1, number + 1)]
    return names, [(own, test[test_site == site]) for site, own in enumerate(owned)]


def make_bags(
    source: SourceTable, units: list[Indices], division: Division, rng: np.random.Generator
) -> list[Indices]:
    """Make the bags of a site in random order, each with its images in random order."""
    bag_size, minimum = division.bag_size, division.minimum_bag_size
    kind, _, argument = division.bags.partition(":")
    shuffled = [units[index] for index in rng.permutation(len(units))]
    if kind == "random" and not argument:
        made = fill_bags(shuffled, bag_size, minimum)
    elif kind == "column" and argument:
        made = _fill_bags_by_value(shuffled, column(source, argument), bag_size, minimum)
    elif kind == "similarity" and not argument:
        features = np.array(
            [np.mean([thumbnail(source.images, index) for index in unit], axis=0) for unit in shuffled]
        )
        order = _order_by_similarity(features, bag_size)
        made = fill_bags([shuffled[index] for index in order], bag_size, minimum)
    else:
        raise UserError(f"--bags {division.bags!r}: write random, column:NAME or similarity")
    # Shuffled within and among bags: sources are often sorted by class, and the order would give labels
    # away.
    return [rng.permutation(made[index]) for index in rng.permutation(len(made))]


def _concentration(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < 1e6:
        raise UserError(f"--partition dirichlet:{text}: ALPHA must be a number above 0, such as 0.5")
    return alpha


def _site_names(values: Sequence[str]) -> list[str]:
    """Turn column values into site names, in which other characters become '-' and no name comes twice."""
    names: list[str] = []
    for value in values:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")[:80] or "site"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names
