"""Build a site folder from bags of images with one count per class and bag, without a label of any image.

Bags (one folder each, or a table) and their counts, long or wide, are read and checked one against the other.
Every fault names its bag, since a bag with a fault can only be used or left out whole. Then the images are
checked, bags with faults are left out where that is asked for, and the rest is written and reported: images
under numbers, the bag of each and the counts of each bag. A label of a single image is nowhere, since nobody
knows one.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from client.data.bags import write_quarantine
from client.data.images import Progress
from client.data.tables import (
    MANIFEST_FILE,
    CsvTable,
    Fault,
    did_you_mean,
    folded,
    read_csv,
    refuse_duplicate_names,
    unknown_label,
    whole_number,
)
from client.site import SiteConfig, SitePolicy
from common.errors import BadRow, DataError, UserError
from common.files import write_csv
from common.hierarchy import Hierarchy
from deploy.datasets.dicom import DICOM_SUFFIXES, MixedImages
from deploy.datasets.files import IMAGE_SUFFIXES, FileIndex, FoundFiles, find_images, is_hidden
from deploy.datasets.site_writer import (
    BuildReport,
    SiteReport,
    Steps,
    image_faults,
    refuse_existing,
    whole_or_nothing,
    write_counts,
    write_images,
)
from deploy.datasets.table import image_column

_BAG_COLUMNS = ("bag", "bag_id", "folder")
_LABEL_COLUMNS = ("label", "class", "leaf", "diagnosis")
_COUNT_COLUMNS = ("count", "number", "images", "n")
_TOTAL_COLUMNS = ("total", "sum")
"""Names of columns, in any case. A wide table may hold the total of its rows, which is then checked."""

_ALIKE = 0.88
"""How alike two names of bags must be to be one: ``week 1`` and ``week 9`` are not."""


@dataclass(frozen=True)
class CountedFiles:
    """Say where the bags of a hospital and their counts are.

    Attributes:
        images: folder of images; without ``bags`` every folder in it is a bag, with all images below it.
        counts: the table of counts: long (a row for each bag and class: ``bag``, ``label``, ``count``) or
            wide (a row for each bag: ``bag``, then a column for each class).
        hierarchy: label tree as CSV, one row per leaf.
        bags: a table with the columns ``image`` and ``bag``.
    """

    images: Path
    counts: Path
    hierarchy: Path
    bags: Path | None = None


@dataclass(frozen=True)
class CountedBags:
    """Hold bags of images with the number of images of each leaf.

    Attributes:
        hierarchy: the label tree.
        bag_ids: the names of the bags that are listed with images and counts, B of them, in the order of the
            counts.
        images: per bag its files, in the order of their names or of the table.
        counts: shape (B, C_L) int64, images per leaf.
        minimum_bag_size: images; a smaller bag is a fault.
        found: images that were found.
        faults: every fault; a bag that one of them names must not be used.
        notes: what the user should know.
    """

    hierarchy: Hierarchy
    bag_ids: tuple[str, ...]
    images: tuple[tuple[Path, ...], ...]
    counts: NDArray[np.int64]
    minimum_bag_size: int
    found: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def read_counted_bags(
    files: CountedFiles, *, minimum_bag_size: int = 4, fold_case: bool = False
) -> CountedBags:
    """Read bags and counts, and check that they fit.

    Args:
        files: where they are.
        minimum_bag_size: images; a smaller bag is a fault.
        fold_case: take labels that differ from a leaf only by case or blanks for that leaf.

    Raises:
        DataError: a table or the tree cannot be read.
        UserError: a folder or a needed column is missing.
    """
    fatal: list[BadRow] = []
    ragged: list[BadRow] = []
    images, bags = files.images, files.bags
    table = read_csv(files.counts, (), fatal, ragged)
    listing = read_csv(bags, (), fatal, ragged) if bags is not None else None
    if table is None or (bags is not None and listing is None):
        raise DataError("the bags cannot be read", fatal)
    tree = Hierarchy.from_csv(files.hierarchy)
    refuse_duplicate_names(tree, files.hierarchy.name)
    faults = [Fault(row) for row in ragged]
    reader = _Counts(table, tree, fold_case, faults)
    members, found = _bags_of_table(images, listing, faults) if listing else _bags_of_folders(images, faults)
    _cross_check(members, reader, images.name, minimum_bag_size, faults)
    both = [bag for bag in reader.vectors if bag in members]
    notes = [f"{files.counts.name} is {reader.layout}: {reader.shape}.", *reader.notes]
    if unlisted := len(found.images) - len({path for paths in members.values() for path in paths}):
        notes.append(f"{unlisted} image(s) below {images.name} are in no bag and were left out.")
    tables = {path.suffix.lower() for path in (files.counts, files.hierarchy, bags) if path is not None}
    return CountedBags(
        hierarchy=tree,
        bag_ids=tuple(both),
        images=tuple(tuple(members[bag]) for bag in both),
        counts=np.array([reader.vectors[bag] for bag in both], np.int64).reshape(len(both), tree.sizes[-1]),
        minimum_bag_size=minimum_bag_size,
        found=len(found.images),
        faults=tuple(faults),
        notes=(*notes, *found.notes(*tables)),
    )


def _bag_column(table: CsvTable) -> str:
    name = table.column(_BAG_COLUMNS)
    if name is None:
        raise UserError(
            f"{table.file} has no bag column; call it one of {', '.join(_BAG_COLUMNS)}. "
            f"Its columns are: {', '.join(table.columns)}"
        )
    return name


class _Counts:
    """Read the table of counts, in either layout, as a vector of leaf counts for every bag in it."""

    def __init__(self, table: CsvTable, tree: Hierarchy, fold_case: bool, faults: list[Fault]) -> None:
        self.file, self._tree, self._faults = table.file, tree, faults
        self._folded = {folded(name): leaf for leaf, name in enumerate(tree.classes[-1])} if fold_case else {}
        self._joined: Counter[str] = Counter()
        self.vectors: dict[str, NDArray[np.int64]] = {}
        self.lines: dict[str, int] = {}
        self.notes: list[str] = []
        bag = _bag_column(table)
        label, count = table.column(_LABEL_COLUMNS), table.column(_COUNT_COLUMNS)
        # A wide table may have a class that is called like one of the columns of a long one.
        if label is not None and count is not None and label not in tree.leaf_index:
            self.layout, self.shape = "long", f"a row for each {bag} and {label}, the number in {count}"
            self._read_long(table, bag, label, count)
        else:
            self.layout = "wide"
            self._read_wide(table, bag)
        if self._joined:
            names = ", ".join(f"{name!r} ({number})" for name, number in self._joined.most_common(5))
            self.notes.append(f"Labels were joined with leaves from which case or blanks differ: {names}.")

    def _fault(self, line: int, reason: str, bag: str | None) -> None:
        self._faults.append(Fault(BadRow(self.file, line, reason), bag))

    def _leaf(self, name: str) -> tuple[int, str]:
        """Return the leaf of a label, and what is wrong with the label."""
        leaf = self._tree.leaf_index.get(name)
        if leaf is None and (leaf := self._folded.get(folded(name))) is not None:
            self._joined[name] += 1
        return (leaf, "") if leaf is not None else (-1, unknown_label(name, self._tree))

    def _open(self, bag: str, line: int) -> NDArray[np.int64]:
        self.lines.setdefault(bag, line)
        return self.vectors.setdefault(bag, np.zeros(self._tree.sizes[-1], dtype=np.int64))

    def _read_long(self, table: CsvTable, bag_column: str, label: str, count: str) -> None:
        seen: dict[tuple[str, int], int] = {}
        for line, row in table:
            bag = row[bag_column]
            if not bag:
                self._fault(line, f"{bag_column} is empty", None)
                continue
            vector = self._open(bag, line)
            leaf, reason = self._leaf(row[label])
            number = whole_number(row[count])
            if reason:
                self._fault(line, reason, bag)
            elif number is None:
                self._fault(line, f"{count} {row[count]!r} is not a whole number >= 0", bag)
            elif (bag, leaf) in seen:
                again = f"is counted already in row {seen[bag, leaf]}"
                self._fault(line, f"label {row[label]!r} of bag {bag!r} {again}", bag)
            else:
                seen[bag, leaf] = line
                vector[leaf] = number

    def _read_wide(self, table: CsvTable, bag_column: str) -> None:
        leaf_of: dict[str, int] = {}
        owner: dict[int, str] = {}
        totals = []
        for name in table.columns:
            if name == bag_column:
                continue
            leaf, reason = self._leaf(name)
            if reason and name.lower() in _TOTAL_COLUMNS:
                totals.append(name)
            elif reason:
                self._fault(1, reason, None)
            elif leaf in owner:
                self._fault(1, f"columns {owner[leaf]!r} and {name!r} are the same leaf", None)
            else:
                leaf_of[name] = leaf
                owner[leaf] = name
        self.shape = f"a row for each {bag_column}, a column for each of {len(leaf_of)} classes"
        blank = 0
        for line, row in table:
            bag = row[bag_column]
            if not bag or bag in self.lines:
                again = f"bag {bag!r} stands already in row {self.lines.get(bag)}"
                self._fault(line, again if bag else f"{bag_column} is empty", bag or None)
                continue
            vector = self._open(bag, line)
            for name, leaf in leaf_of.items():
                number = whole_number(row[name] or "0")
                blank += not row[name]
                if number is None:
                    self._fault(line, f"{name} {row[name]!r} is not a whole number >= 0", bag)
                else:
                    vector[leaf] = number
            for name in totals:
                if whole_number(row[name]) != vector.sum():
                    self._fault(line, f"{name} says {row[name]}, the classes sum to {vector.sum()}", bag)
        if blank:
            self.notes.append(f"{blank} blank cell(s) of {table.file} count as 0.")


def _is_picture(ending: str) -> bool:
    return ending in IMAGE_SUFFIXES or ending in DICOM_SUFFIXES


def _bags_of_folders(root: Path, faults: list[Fault]) -> tuple[dict[str, list[Path]], FoundFiles]:
    """Return the images below each folder in ``root``, by the folder's name.

    Pictures outside these folders are faults.
    """
    found = find_images(root, _is_picture)
    folders = (path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name))
    members: dict[str, list[Path]] = {path.name: [] for path in folders}
    for path in found.images:
        bag, *rest = path.relative_to(root).parts
        if rest:
            members[bag].append(path)
        else:
            faults.append(Fault(BadRow(path.name, None, "lies in no bag folder")))
    for bag, paths in members.items():
        if not paths:
            faults.append(Fault(BadRow(f"{root.name}/{bag}", None, "the bag folder holds no image"), bag))
    return members, found


def _bags_of_table(
    root: Path, table: CsvTable, faults: list[Fault]
) -> tuple[dict[str, list[Path]], FoundFiles]:
    """Return the images of each bag, in the order of a table."""
    index = FileIndex(root, _is_picture)
    image, bag_name = image_column(table), _bag_column(table)
    members: dict[str, list[Path]] = {}
    first: dict[Path, tuple[int, str]] = {}
    for line, row in table:
        bag = row[bag_name]
        path, reason = index.find(row[image])
        also = None
        if not bag:
            reason = f"{bag_name} is empty"
        elif not reason and path in first:
            row_before, also = first[path]
            other = "" if also == bag else f" as one of bag {also!r}"
            reason = f"image {row[image]!r} stands already in row {row_before}{other}"
        if bag:
            members.setdefault(bag, [])
        if reason:
            # An image in two bags spoils both: nobody knows to which of them its label was counted.
            spoilt = dict.fromkeys((bag or None, also or bag or None))
            faults += [Fault(BadRow(table.file, line, reason), name) for name in spoilt]
            continue
        first[path] = (line, bag)
        members[bag].append(path)
    return members, index.found


def _cross_check(
    members: dict[str, list[Path]], counts: _Counts, root: str, minimum: int, faults: list[Fault]
) -> None:
    """Add the faults between bags and counts, unless a bag is faulty already."""
    spoilt = {fault.bag for fault in faults}
    for bag, paths in members.items():
        if bag in spoilt:
            continue
        if bag not in counts.vectors:
            near = did_you_mean(bag, counts.vectors.keys() - members.keys(), _ALIKE)
            reason = f"bag {bag!r} ({len(paths)} image(s)) has no counts in {counts.file}{near}"
            faults.append(Fault(BadRow(root, None, reason), bag))
            continue
        total, reason = int(counts.vectors[bag].sum()), ""
        if total != len(paths):
            reason = f"counts {total} image(s), but {len(paths)} were found in it"
        elif len(paths) < minimum:
            reason = f"holds {len(paths)} image(s), the minimum is {minimum} (--minimum-bag-size)"
        if reason:
            row = BadRow(counts.file, counts.lines[bag], f"bag {bag!r} {reason}")
            faults.append(Fault(row, bag))
    for bag in counts.vectors:
        if bag in members or bag in spoilt:
            continue
        near = did_you_mean(bag, members.keys() - counts.vectors.keys(), _ALIKE)
        row = BadRow(counts.file, counts.lines[bag], f"bag {bag!r} has counts, but no image{near}")
        faults.append(Fault(row, bag))


def build_counted_site(
    bags: CountedBags, out: Path, name: str, *, skip_bad: bool = False, progress: Progress | None = None
) -> BuildReport:
    """Add the site folder ``out/name``, or nothing at all.

    Args:
        bags: what the hospital has.
        out: folder of site folders; made if missing.
        name: of the site, also its folder.
        skip_bad: leave out every bag with a fault, and list the faults in the site's quarantine.csv.
        progress: called with (done, all); every image counts once for checking, once for writing.

    Raises:
        DataError: faults, all of them; or no bag is left.
        UserError: the name cannot be one, ``out/name`` exists, or the disk refuses.
    """
    try:
        config = SiteConfig(name=name, policy=SitePolicy(minimum_bag_size=bags.minimum_bag_size))
    except ValidationError as error:
        reasons = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        raise UserError(f"--name {name!r} cannot name a site: {reasons}") from error
    # Hidden folders are passed over when sites are listed: they are what a build that was broken off
    # leaves.
    if name.startswith("."):
        raise UserError(f"--name {name!r}: a hidden folder is no site; begin with a letter or a digit")
    target = out / name
    refuse_existing(target, "--name")
    paths = [path for members in bags.images for path in members]
    bag_of = [number for number, members in enumerate(bags.images) for _ in members]
    images = MixedImages(paths)
    step = Steps(2 * len(paths), progress)
    faults = list(bags.faults)
    for index, reason in image_faults(images, len(paths), step):
        bag = bags.bag_ids[bag_of[index]]
        faults.append(Fault(BadRow(f"bag {bag}", None, reason), bag))
    rows = list(dict.fromkeys(fault.row for fault in faults))
    if rows and not skip_bad:
        advice = "Mend these, or leave the bags that they concern out with --skip-bad."
        raise DataError(f"the bags of {name!r} have {len(rows)} fault(s)", rows, advice)
    spoilt = {fault.bag for fault in faults}
    good = [number for number, bag in enumerate(bags.bag_ids) if bag not in spoilt]
    if not good:
        raise DataError(f"no bag of {name!r} can be used", rows, "List each bag with its images and counts.")
    used = np.flatnonzero(np.isin(bag_of, good))
    with whole_or_nothing(target, lambda: sum(images.size(index) for index in used.tolist())) as folder:
        bag_ids = [bags.bag_ids[number] for number in good]
        write_counts(folder, config, bags.hierarchy, bag_ids, bags.counts[good])
        files = write_images(folder / "images", images, used, np.arange(len(used)), step)
        listed = [
            (file, bags.bag_ids[bag_of[index]]) for file, index in zip(files, used.tolist(), strict=True)
        ]
        write_csv(folder / MANIFEST_FILE, ("path", "bag_id"), listed)
        write_quarantine(folder, rows)
    sizes = [len(bags.images[number]) for number in good]
    return BuildReport(
        out=target,
        sites=(SiteReport.of(name, sizes, 0),),
        listed=bags.found,
        used=sum(sizes),
        quarantined=len(rows),
        max_bags_per_group=None,
        notes=(*bags.notes, *_twins([paths[index] for index in used], [bag_of[index] for index in used])),
    )


def _twins(paths: Sequence[Path], bag_of: Sequence[int]) -> tuple[str, ...]:
    """Note images that are the same byte for byte.

    If they lie in two bags, a privacy statement per bag covers them only in part.
    """
    # By size first, so that only images that may be the same are read.
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        by_size[path.stat().st_size].append(index)
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for alike in by_size.values():
        for index in alike if len(alike) > 1 else ():
            by_content[hashlib.sha256(paths[index].read_bytes()).digest()].append(index)
    same = [indices for indices in by_content.values() if len(indices) > 1]
    if not same:
        return ()
    apart = sum(len({bag_of[index] for index in indices}) > 1 for indices in same)
    example = " and ".join(str(Path(*paths[index].parts[-2:])) for index in same[0][:2])
    return (
        f"{sum(map(len, same))} images are the same as another, byte for byte ({example}); {apart} of these "
        f"{len(same)} lie in more than one bag, and a privacy statement per bag covers them only in part.",
    )
