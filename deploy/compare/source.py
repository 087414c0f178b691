"""Read the source of a comparison and choose its training and test images.

The module knows nothing of folders, methods or runs.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import BadRow, DataError, UserError
from deploy.compare.scenario import Data
from deploy.datasets.build import read_split
from deploy.datasets.catalogue import SourceKind, open_source
from deploy.datasets.files import ArrayImages, SourceTable
from deploy.datasets.partition import Indices, column, units_of

SPLIT_SEED = 0
"""The test images and a limit are the same for every cell, whatever its seed."""


@dataclass(frozen=True)
class OpenedData:
    """Hold a source with its training and test images, as indices into the table."""

    table: SourceTable
    train: Indices
    test: Indices
    group_column: str | None
    digest: str


def open_data(data: Data, folder: Path, path: Path | None = None) -> OpenedData:
    """Read a scenario's source without opening any image file.

    Args:
        data: the scenario's table.
        folder: where its relative paths start.
        path: stands in for ``data.path``; other files are expected at the same place relative to it.

    Raises:
        UserError: what the source raises; no split and no test-share; a group on both sides of the split.
        DataError: rows that cannot be used.
    """
    table = _open_table(data, folder, path)
    group_column = data.group_column or table.group_column
    groups = column(table, group_column) if group_column else None
    train, test = _split(table, data, groups)
    if groups is not None and (shared := {groups[i] for i in train} & {groups[i] for i in test}):
        raise UserError(
            f"{len(shared)} group(s) of column {group_column!r} have training and test images, such as "
            f"{min(shared)!r}: the test would reward recognising them. Mend the split, or use test-share."
        )
    rng = np.random.default_rng(SPLIT_SEED)
    train, test = (_at_most(part, data.limit, groups, rng) for part in (train, test))
    if not len(test):
        raise UserError(f"{table.file} has no test image: nothing could be compared")
    return OpenedData(table, train, test, group_column, _digest(table, train, test, group_column))


def _open_table(data: Data, folder: Path, path: Path | None) -> SourceTable:
    usual = Path(os.path.normpath(folder / data.path)) if data.path else None

    def beside(name: str) -> Path | None:
        """Return the path of another file of the data set, at the same place relative to its new folder."""
        if not name:
            return None
        if path is None or usual is None or Path(name).is_absolute():
            return folder / name
        return Path(os.path.normpath(path / os.path.relpath(folder / name, usual)))

    try:
        table = open_source(
            data.source,
            images=path or usual,
            labels=beside(data.labels),
            hierarchy=beside(data.hierarchy),
            label_column=data.label_column,
            sites=data.sites,
            images_per_site=data.images_per_site,
            image_size=data.image_size,
        )
    except UserError as error:
        if isinstance(error, DataError) or data.source is SourceKind.SYNTHETIC:
            raise
        hint = f"\n{data.origin}" if data.origin else ""
        raise UserError(f"{error}{hint}\nAnother place? Give it with --data.") from error
    if table.bad and not data.skip_bad:
        raise refused(table, list(table.bad))
    if data.levels is None:
        return table
    if len(data.levels) != len(table.hierarchy.levels):
        raise UserError(
            f"[data] names {len(data.levels)} levels, but {table.file} has {len(table.hierarchy.levels)}: "
            f"{', '.join(table.hierarchy.levels)}"
        )
    return replace(table, hierarchy=replace(table.hierarchy, levels=data.levels))


def refused(table: SourceTable, bad: list[BadRow]) -> DataError:
    """Return the error that names these rows of the table's file."""
    return DataError(
        f"{table.file} holds {len(bad)} bad row(s)",
        sorted(bad, key=lambda row: row.row or 0),
        "Mend these rows, or leave them out with skip-bad = true in [data].",
    )


def _split(table: SourceTable, data: Data, groups: Sequence[str] | None) -> tuple[Indices, Indices]:
    name = data.split_column or table.split_column
    everything = np.arange(len(table))
    if data.test_share is not None:
        if data.split_column:
            raise UserError("[data] has split-column and test-share: say one of them")
        rng = np.random.default_rng(SPLIT_SEED)
        test = _at_most(everything, round(data.test_share * len(table)), groups, rng)
        return np.setdiff1d(everything, test), test
    if name is None:
        raise UserError(
            f"{table.file} has no split into training and test images: say split-column or test-share "
            "in [data]"
        )
    bad: list[BadRow] = []
    is_train, is_test = read_split(table, name, bad)
    if bad and not data.skip_bad:
        raise refused(table, bad)
    return np.flatnonzero(is_train), np.flatnonzero(is_test)


def _at_most(
    images: Indices, number: int | None, groups: Sequence[str] | None, rng: np.random.Generator
) -> Indices:
    """Return at most this many images, drawn at random in whole groups, in their order."""
    if number is None or len(images) <= number:
        return images
    units = units_of(images, groups)
    drawn, held = [], 0
    for position in rng.permutation(len(units)).tolist():
        if held + len(units[position]) <= number:
            drawn.append(units[position])
            held += len(units[position])
    return np.sort(np.concatenate(drawn)) if drawn else images[:0]


def _digest(table: SourceTable, train: Indices, test: Indices, group_column: str | None) -> str:
    """Return a SHA-256 of everything that cells could depend on.

    It covers the pixels of arrays, but of image files only names and sizes.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        # The zero byte keeps neighbouring values apart.
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\0")

    add(
        [
            table.hierarchy.to_dict(),
            group_column,
            {name: list(cells) for name, cells in table.columns.items()},
        ]
    )
    arrays: list[NDArray[Any]] = [table.labels, train, test]
    for array in arrays:
        add([len(array), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()])
    for index in (*train.tolist(), *test.tolist()):
        # Reading every image file would take as long as decoding them, at each start of the command.
        if isinstance(table.images, ArrayImages):
            digest.update(table.images.get(index).tobytes())
        else:
            add([Path(table.images.name(index)).name, table.images.size(index)])
    return digest.hexdigest()
