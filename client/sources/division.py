"""Divide a source table into sites by `--partition`, and a site into bags by `--bags`."""

import re
from collections.abc import Sequence

import numpy as np

from client.sources.partition import (
    Indices,
    fill_bags,
    fill_bags_by_value,
    order_by_similarity,
    partition_dirichlet,
    partition_iid,
    spread_like,
    units_of,
)
from client.sources.source_table import SourceTable, thumbnail
from common.errors import UserError

BAGS_AT_LEAST = 4
"""Bags that `dirichlet` leaves to its poorest site, where there are enough images."""

MISSING_WORDS = frozenset(
    {
        "",
        "nan",
        "na",
        "n/a",
        "#n/a",
        "<na>",
        "none",
        "null",
        "nil",
        "nat",
        "missing",
        "unknown",
        "-",
        "--",
        "?",
    }
)


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
    return cell.strip().lower() in MISSING_WORDS


def groups_of(source: SourceTable, name: str) -> list[str]:
    """Return the group of every image, with a group of its own for an image whose cell is missing."""
    return [
        f"{cell} without {name}, number {index}" if is_missing(cell) else cell
        for index, cell in enumerate(column(source, name))
    ]


def divide(
    source: SourceTable,
    train: Indices,
    test: Indices,
    groups: Sequence[str] | None,
    partition: str,
    sites: int | None,
    bag_size: int,
    rng: np.random.Generator,
) -> tuple[list[str], list[tuple[list[Indices], Indices]]]:
    """Return the name of every site, with its training units and test images."""
    kind, _, argument = partition.partition(":")
    if kind == "column" and argument:
        values = column(source, argument)
        chosen = sorted({values[index] for index in train})
        if sites not in (None, len(chosen)):
            raise UserError(f"--sites {sites}: column {argument!r} has {len(chosen)} values")
        cells = np.array(values, dtype=object)
        parts = [
            (units_of(train[cells[train] == value], groups), test[cells[test] == value]) for value in chosen
        ]
        return _site_names(chosen), parts
    number = 5 if sites is None else sites
    if number < 1:
        raise UserError(f"--sites {number}: at least one site is needed")
    units = units_of(train, groups)
    if kind == "iid" and not argument:
        site_of = partition_iid(units, number, rng)
    elif kind == "dirichlet":
        fewest = min(BAGS_AT_LEAST * bag_size, len(train) // (2 * number))
        alpha = _concentration(argument)
        site_of = partition_dirichlet(units, source.labels, number, alpha, fewest, rng)
    else:
        raise UserError(f"--partition {partition!r}: write iid, dirichlet:ALPHA or column:NAME")
    split = [[units[index] for index in np.flatnonzero(site_of == site)] for site in range(number)]
    none = np.zeros(0, dtype=np.int64)
    counts = np.stack(
        [
            np.bincount(source.labels[np.concatenate([none, *own])], minlength=source.hierarchy.sizes[-1])
            for own in split
        ]
    )
    test_site = spread_like(test, source.labels, counts, rng)
    width = len(str(number))
    names = [f"site-{site:0{width}d}" for site in range(1, number + 1)]
    return names, [(own, test[test_site == site]) for site, own in enumerate(split)]


def make_bags(
    source: SourceTable,
    units: list[Indices],
    bags: str,
    bag_size: int,
    minimum: int,
    rng: np.random.Generator,
) -> list[Indices]:
    """Make the bags of a site in random order, each with its images in random order."""
    kind, _, argument = bags.partition(":")
    shuffled = [units[index] for index in rng.permutation(len(units))]
    if kind == "random" and not argument:
        made = fill_bags(shuffled, bag_size, minimum)
    elif kind == "column" and argument:
        made = fill_bags_by_value(shuffled, column(source, argument), bag_size, minimum)
    elif kind == "similarity" and not argument:
        features = np.array(
            [np.mean([thumbnail(source.images, index) for index in unit], axis=0) for unit in shuffled]
        )
        order = order_by_similarity(features, bag_size)
        made = fill_bags([shuffled[index] for index in order], bag_size, minimum)
    else:
        raise UserError(f"--bags {bags!r}: write random, column:NAME or similarity")
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
