"""Read the data of a comparison, and write them once to disk with a folder of site folders per division.

OUT/data/DIGEST/images/     every training image, named by number in random order
OUT/data/DIGEST/test/       the test images with their labels, which training never reads
OUT/data/DIGEST/DIVISION/   site folders (docs/data.md) whose images are hard links to those of images/
OUT/data/DIGEST/DIVISION.alone/siteK/   one of those sites by itself, as a link

The digest is of the content, so that changed data get new folders. All of it can be deleted between calls.
The module knows nothing of methods or runs.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.bags import BagStore
from client.data.images import Progress
from client.data.labelled import LabelledImages
from client.data.tables import TEST_FILE
from client.site import SiteConfig, site_folders
from common.errors import BadRow, DataError, UserError, writable
from common.files import new_folder, write_csv
from deploy.compare.scenario import Cell, Data
from deploy.datasets.build import open_source, read_split, write_sites
from deploy.datasets.files import ArrayImages, FileImages, SourceTable, image_fault
from deploy.datasets.options import Division, SourceKind, SourceOptions, SyntheticHospitals
from deploy.datasets.partition import Indices, Split, column, units_of

_SPLIT_SEED = 0
"""The test images and a limit are the same for every cell, whatever its seed."""
_LIST = "images.json"


def _folder_name(division: Division) -> str:
    """Return a folder name that no other division of the same data has."""
    words = (
        division.partition,
        f"{division.sites}-sites",
        division.bags,
        division.groups,
        f"bag{division.bag_size}",
        f"seed{division.seed}",
    )
    return "_".join(word.replace(":", "-").replace("/", "-") for word in words)


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
    rng = np.random.default_rng(_SPLIT_SEED)
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
        labels, hierarchy = beside(data.labels), beside(data.hierarchy)
        options = SourceOptions(data.source, path or usual, labels, hierarchy, data.label_column)
        number = data.images_per_site
        table = open_source(options, SyntheticHospitals(data.sites, 0, number, data.image_size, number // 5))
    except UserError as error:
        if isinstance(error, DataError) or data.source is SourceKind.SYNTHETIC:
            raise
        hint = f"\n{data.origin}" if data.origin else ""
        raise UserError(f"{error}{hint}\nAnother place? Give it with --data.") from error
    if table.bad and not data.skip_bad:
        raise _refused(table, list(table.bad))
    if data.levels is None:
        return table
    if len(data.levels) != len(table.hierarchy.levels):
        raise UserError(
            f"[data] names {len(data.levels)} levels, but {table.file} has {len(table.hierarchy.levels)}: "
            f"{', '.join(table.hierarchy.levels)}"
        )
    return replace(table, hierarchy=replace(table.hierarchy, levels=data.levels))


def _refused(table: SourceTable, bad: list[BadRow]) -> DataError:
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
        rng = np.random.default_rng(_SPLIT_SEED)
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
        raise _refused(table, bad)
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


class DataFolders:
    """Create the folders below OUT/data for one source, each of them completely or not at all."""

    def __init__(self, root: Path, opened: OpenedData, skip_bad: bool) -> None:
        self.root = root / opened.digest[:12]
        self._opened, self._skip_bad = opened, skip_bad
        self._bag_sizes: dict[Path, NDArray[np.int64]] = {}

    @property
    def test(self) -> Path:
        """Return the folder of the test images, in the form that LabelledImages.open reads."""
        return self.root / "test"

    def sites_dir(self, cell: Cell) -> Path:
        """Return the folder of site folders that this cell trains on."""
        name = _folder_name(cell.division)
        return self.root / name if cell.site is None else self.root / f"{name}.alone" / f"site{cell.site}"

    def site_name(self, cell: Cell) -> str | None:
        """Return the name of a local-only cell's site, whose folder must exist, or None for other cells."""
        return None if cell.site is None else site_folders(self.sites_dir(cell))[0].name

    def images_per_bag(self, cell: Cell) -> float:
        """Return the mean number of images in the cell's bags, held-back bags included.

        The cell's folders must have been prepared.
        """
        sites = [self._bag_sizes[site.resolve()] for site in site_folders(self.sites_dir(cell))]
        return float(np.concatenate(sites).mean())

    def prepare(self, cells: Iterable[Cell], progress: Callable[[str], Progress]) -> None:
        """Create every folder that these cells need, and decode its images to the cells' image sizes.

        Args:
            cells: the cells to prepare for.
            progress: called with what is being made, returns the function that counts its images.

        Raises:
            UserError: a faulty division, bags that cannot have their size, or the disk refuses.
            DataError: images that cannot be decoded.
        """
        cells = list(cells)
        if not cells:
            return
        # The sizes are checked before the images are stored, which takes long.
        divisions = dict.fromkeys(cell.division for cell in cells)
        for division in divisions:
            self._check_size(division)
        self._store_images(progress("storing the images"))
        for division in divisions:
            self._divide(division, progress(f"dividing: {_folder_name(division)}"))
        # Decoded before any cell starts: cells run at the same time, and then only read the cache.
        for site, size, features in dict.fromkeys(
            (site, cell.config.model.image_size, cell.config.model.feature_names)
            for cell in cells
            for site in site_folders(self.sites_dir(cell))
        ):
            # A site and the link to it are one folder, which is decoded once.
            site = site.resolve()
            decoding = progress(f"decoding: {site.parent.name}")
            store = BagStore.open(site, size, features=features, progress=decoding)
            self._bag_sizes[site] = store.bag_sizes
        wanted = [(cell.config.model.image_size, cell.config.model.feature_names) for cell in cells]
        for size, features in dict.fromkeys(wanted):
            decoding = progress("decoding: test images")
            LabelledImages.open(self.test, size, features=features, progress=decoding)

    def _store_images(self, progress: Progress) -> None:
        if (self.root / _LIST).is_file():
            return
        opened, table, bad = self._opened, self._opened.table, list[BadRow]()
        with writable(self.root), new_folder(self.root) as folder:
            # Numbered in random order, so that no file name reveals a label: a source may be sorted by class.
            rng = np.random.default_rng(_SPLIT_SEED)
            done, total = 0, len(opened.train) + len(opened.test)
            names: dict[str, list[str | None]] = {}
            for part, indices in (("images", opened.train), ("test/test", opened.test)):
                (folder / part).mkdir(parents=True)
                names[part] = [None] * len(indices)
                for number, position in enumerate(rng.permutation(len(indices)).tolist(), start=1):
                    index = int(indices[position])
                    if fault := image_fault(table.images, index):
                        bad.append(BadRow(table.file, table.lines[index], fault))
                    else:
                        stem = folder / part / f"{number:06d}"
                        names[part][position] = stem.name + table.images.write(index, stem)
                    done += 1
                    progress(done, total)
            if bad and not self._skip_bad:
                raise _refused(table, bad)
            leaves = table.hierarchy.classes[-1]
            rows = [
                (f"test/{name}", leaves[table.labels[index]])
                for name, index in zip(names["test/test"], opened.test.tolist(), strict=True)
                if name is not None
            ]
            write_csv(folder / "test" / TEST_FILE, ("path", "label"), rows)
            table.hierarchy.to_csv(folder / "test" / "hierarchy.csv")
            SiteConfig(name="test").save(folder / "test")
            (folder / _LIST).write_text(json.dumps(names["images"]), encoding="utf-8")

    def _divide(self, division: Division, progress: Progress) -> None:
        out = self.root / _folder_name(division)
        if not out.exists():
            table = self._training_table()
            done = 0

            def step() -> None:
                nonlocal done
                done += 1
                progress(done, len(table))

            split = Split(np.arange(len(table)), np.zeros(0, dtype=np.int64))
            write_sites(table, out, division, split, step)
        alone = out.with_name(f"{out.name}.alone")
        if not alone.exists():
            with writable(alone), new_folder(alone) as folder:
                for number, site in enumerate(site_folders(out), start=1):
                    (folder / f"site{number}").mkdir()
                    (folder / f"site{number}" / site.name).symlink_to(Path("..", "..", out.name, site.name))

    def _check_size(self, division: Division) -> None:
        """Refuse a bag size that no value of the bags' column has images for.

        The images of such a bag share one value of the column.
        """
        kind, _, name = division.bags.partition(":")
        if kind != "column":
            return
        values = column(self._opened.table, name)
        most = max(Counter(values[index] for index in self._opened.train.tolist()).values())
        if most < division.bag_size:
            raise UserError(
                f"[data] bags = {division.bags!r}: no value has the {division.bag_size} training images of a "
                f"bag (the most is {most}); a row would name a size that its bags do not have\n"
                f"Ask for smaller ones, such as bag-sizes = [{most}]."
            )

    def _training_table(self) -> SourceTable:
        """Return the stored training images as a table without a split."""
        names = json.loads((self.root / _LIST).read_text(encoding="utf-8"))
        table = self._opened.table
        kept = [
            (self.root / "images" / name, index)
            for name, index in zip(names, self._opened.train.tolist(), strict=True)
            if name is not None
        ]
        rows = [index for _, index in kept]
        return replace(
            table,
            images=_LinkedImages([path for path, _ in kept]),
            labels=table.labels[rows],
            lines=[table.lines[index] for index in rows],
            columns={name: [cells[index] for index in rows] for name, cells in table.columns.items()},
            split_column=None,
            bad=(),
        )


class _LinkedImages(FileImages):
    """Represent image files that are hard-linked into a site folder, so that no pixel is stored twice."""

    def write(self, index: int, stem: Path) -> str:
        """Write an image to ``stem`` plus a suffix, and return the suffix."""
        path = self.paths[index]
        try:
            os.link(path, stem.with_suffix(path.suffix))
        # Not every file system has hard links.
        except OSError:
            shutil.copyfile(path, stem.with_suffix(path.suffix))
        return path.suffix
