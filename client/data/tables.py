"""Read the CSV tables of a site folder and check them against one another, without opening images.

Every fault is a row that the user can find, with the line on which it stood. Faults that make a whole file
unusable are raised at once (all of them together); the others are returned with the bag they concern, and the
caller decides. Class names that people write in several ways (``Nevus``, ``nevus``, and ``nevus`` with a
blank of no width) are never joined in silence: a source refuses them, or joins them where that was asked
for.
"""

import difflib
import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from client.site import BUILD_ADVICE, SiteConfig
from common.errors import BadRow, DataError
from common.files import TableError, read_rows
from common.hierarchy import Hierarchy

_WHOLE = re.compile(r"([0-9]{1,9})(?:[.,]0*)?")

MANIFEST_FILE, BAGS_FILE, TEST_FILE = "manifest.csv", "bags.csv", "test.csv"


@dataclass(frozen=True)
class CsvTable:
    """Hold the rows of one file.

    ``rows[i]`` maps each column to its stripped cell and stood on ``lines[i]``.
    """

    file: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        return zip(self.lines, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, names: Sequence[str]) -> str | None:
        """Return the first of these columns that the table has, whatever their case, or None."""
        by_name = {name.lower(): name for name in reversed(self.columns)}
        return next((by_name[name] for name in names if name in by_name), None)


def read_csv(path: Path, required: Sequence[str], fatal: list[BadRow], bad: list[BadRow]) -> CsvTable | None:
    """Read a table with a header, collecting its faults.

    ``common.files`` decides which encodings and separators are read.

    Args:
        path: the file; faults name it by its last part.
        required: columns that must be there; others are kept too.
        fatal: receives what makes the whole file unusable (missing, not text, no such column).
        bad: receives rows whose number of cells differs from the header's; they are left out.

    Returns:
        The table, or None when something was added to ``fatal``.
    """
    file = path.name
    try:
        data = path.read_bytes()
    except OSError as error:
        fatal.append(BadRow(file, None, f"cannot be read: {error.strerror or error}"))
        return None
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    columns: tuple[str, ...] = ()
    try:
        numbered = read_rows(data)
        columns = tuple(name.strip() for name in next(numbered, (1, []))[1])
        missing = [name for name in required if name not in columns]
        if missing or len(set(columns)) != len(columns):
            what = f"lacks column(s) {missing}" if missing else "names a column twice"
            fatal.append(BadRow(file, 1, f"the header {what}; it has {list(columns)}"))
            return None
        for line, cells in numbered:
            if len(cells) != len(columns):
                bad.append(BadRow(file, line, f"{len(cells)} cells where the header has {len(columns)}"))
                continue
            rows.append({name: cell.strip() for name, cell in zip(columns, cells, strict=True)})
            lines.append(line)
    except TableError as error:
        fatal.append(BadRow(file, error.line, error.reason))
        return None
    return CsvTable(file, columns, tuple(rows), tuple(lines))


def whole_number(cell: str) -> int | None:
    """Return the integer >= 0 that a cell holds (``2``, or ``2.0`` from a spreadsheet), or None."""
    match = _WHOLE.fullmatch(cell)
    return int(match[1]) if match else None


def folded(name: str) -> str:
    """Return the name in one case and Unicode form, without invisible, doubled or outer blanks."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    # Normalised a second time: letters that an invisible sign kept apart may combine now.
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


def did_you_mean(name: str, known: Iterable[str], alike: float = 0.75) -> str:
    """Return a hint at the known name most like this one, or an empty text if none is near.

    ``alike`` is difflib's ratio in [0, 1] that a name must reach; of numbered names many are nearly alike.
    """
    choices = {folded(other): other for other in known}
    near = difflib.get_close_matches(folded(name), choices, n=1, cutoff=alike)
    return f"; did you mean {choices[near[0]]!r}?" if near else ""


def unknown_label(name: str, tree: Hierarchy) -> str:
    """Describe a label that is no leaf, and whether it is a coarser class or near a leaf."""
    for level, classes in zip(tree.levels[:-1], tree.classes[:-1], strict=True):
        if name in classes:
            return f"label {name!r} is a class of level {level}; counts and labels are of leaves"
    return f"unknown label {name!r}; it is no leaf of the hierarchy{did_you_mean(name, tree.classes[-1])}"


def refuse_duplicate_names(tree: Hierarchy, file: str) -> None:
    """Refuse a tree in which two classes of a level differ only by case, blanks or the form of a letter.

    Raises:
        DataError: there are such classes; all are named.
    """
    rows = []
    for level, classes in zip(tree.levels, tree.classes, strict=True):
        first: dict[str, str] = {}
        for name in classes:
            other = first.setdefault(folded(name), name)
            if other != name:
                reason = f"{level} {name!r} and {other!r} differ only by case, blanks or the form of a letter"
                rows.append(BadRow(file, None, f"{reason}; did you mean {other!r}?"))
    if rows:
        advice = "Write each class in one way; --fold-case joins such classes of tables and folders."
        raise DataError(f"{len(rows)} class(es) are written in two ways", rows, advice)


def usual_spellings(names: Sequence[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Return for every name the spelling to use, a known one or the most frequent that folds alike.

    Of spellings that are equally frequent the first in the order of the alphabet is used.
    """
    chosen: dict[str, str] = {}
    for name, _ in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])):
        chosen.setdefault(folded(name), name)
    chosen |= {folded(name): name for name in known}
    return {name: chosen[folded(name)] for name in set(names)}


@dataclass(frozen=True)
class Fault:
    """Describe a bad row and the bag that it spoils.

    The bag is None where none can be named.
    """

    row: BadRow
    bag: str | None = None


@dataclass(frozen=True)
class _ImageRow:
    """Represent one image of a table with its path as written, its label or bag id, and its line."""

    path: str
    key: str
    line: int


@dataclass(frozen=True)
class Listing:
    """Hold the content of manifest.csv and bags.csv, with images grouped by bag.

    Attributes:
        images: rows with a usable path, bag after bag in order of first appearance.
        listed: rows of the manifest, usable or not.
        bag_ids: one id per bag.
        offsets: shape (B + 1,): bag b holds ``images[offsets[b]:offsets[b + 1]]``.
        counts: shape (B, C_L) int64, images per leaf as in bags.csv.
        faults: every bad row.
    """

    images: tuple[_ImageRow, ...]
    listed: int
    bag_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    faults: tuple[Fault, ...] = field(default=())


def read_hierarchy(site_dir: Path, config: SiteConfig, fatal: list[BadRow]) -> Hierarchy | None:
    """Read the site's label tree, and append its faults to ``fatal``."""
    try:
        tree = Hierarchy.from_csv(site_dir / config.hierarchy)
        refuse_duplicate_names(tree, config.hierarchy)
        return tree
    except DataError as error:
        rows = error.rows or (BadRow(config.hierarchy, None, error.summary),)
        fatal.extend(BadRow(config.hierarchy, row.row, row.reason) for row in rows)
        return None


def read_listing(site_dir: Path, config: SiteConfig) -> tuple[Hierarchy, Listing]:
    """Parse manifest.csv, bags.csv and the hierarchy of a site.

    Raises:
        DataError: a file is missing, not text, lacks a column, or the hierarchy is no tree.
    """
    fatal: list[BadRow] = []
    ragged: list[BadRow] = []
    manifest = read_csv(site_dir / MANIFEST_FILE, ("path", "bag_id"), fatal, ragged)
    bags = read_csv(site_dir / BAGS_FILE, ("bag_id", "label", "count"), fatal, ragged)
    hierarchy = read_hierarchy(site_dir, config, fatal)
    if manifest is None or bags is None or hierarchy is None:
        raise DataError(
            f"the folder of site {config.name!r} cannot be read: {site_dir}",
            fatal,
            f"Mend these files. {BUILD_ADVICE}",
        )
    faults = [Fault(row) for row in ragged]
    images = collect_images(site_dir, manifest, "bag_id", faults)
    counts = _collect_counts(bags, hierarchy, faults)
    _cross_check(manifest, bags, counts, config.policy.minimum_bag_size, faults)
    bag_ids = tuple(dict.fromkeys(row.key for row in images))
    order = {bag: number for number, bag in enumerate(bag_ids)}
    grouped = tuple(sorted(images, key=lambda row: order[row.key]))
    sizes = np.bincount([order[row.key] for row in images], minlength=len(bag_ids)).astype(np.int64)
    none = np.zeros(hierarchy.sizes[-1], dtype=np.int64)
    listing = Listing(
        images=grouped,
        listed=len(manifest),
        bag_ids=bag_ids,
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        counts=np.stack([counts.get(bag, none) for bag in bag_ids]) if bag_ids else none[None][:0],
        faults=tuple(faults),
    )
    return hierarchy, listing


def collect_images(site_dir: Path, table: CsvTable, key: str, faults: list[Fault]) -> list[_ImageRow]:
    """Return the rows whose path is a regular file inside the site folder, each path once.

    Args:
        site_dir: the site folder.
        table: manifest.csv or test.csv, with a ``path`` column.
        key: the other column to keep (``bag_id`` or ``label``).
        faults: receives the other rows, each with its ``key`` as the bag.
    """
    root = os.path.realpath(site_dir)
    inside: dict[Path, bool] = {}
    first: dict[str, int] = {}
    images = []
    for line, row in table:
        path = row["path"]
        reason = f"{key} is empty" if not row[key] else _path_fault(root, path, inside)
        if not reason and path in first:
            reason = f"{path!r} stands already in row {first[path]}"
        if reason:
            faults.append(Fault(BadRow(table.file, line, reason), row[key]))
        else:
            first[path] = line
            images.append(_ImageRow(path, row[key], line))
    return images


def content_hash(site_dir: Path, files: Sequence[str], images: Sequence[_ImageRow]) -> str:
    """Hash a data version cheaply, as SHA-256 over tables and over size and time of every image.

    The tables enter byte by byte, an image by path, size in bytes and modification time: reading all
    pixels would cost as much as the cache saves. Touching or copying files therefore makes a new
    version although the pixels are the same; an image replaced by one of the same size *and* time
    goes unnoticed.
    """
    digest = hashlib.sha256()
    for name in files:
        data = (site_dir / name).read_bytes()
        # With its length before it, no content can be moved from one table to the next under the same
        # hash.
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    for row in images:
        status = (site_dir / row.path).stat()
        digest.update(f"{row.path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def data_version(site_dir: Path, config: SiteConfig, listing: Listing) -> str:
    """Return the fingerprint of everything that bags are made of.

    The privacy ledger tells data versions apart by it.
    """
    return content_hash(site_dir, (MANIFEST_FILE, BAGS_FILE, config.hierarchy), listing.images)


def _path_fault(root: str, path: str, inside: dict[Path, bool]) -> str:
    """Describe why a path cannot be used, or return an empty text.

    ``inside`` remembers folders that were already looked up.
    """
    if not path or "\0" in path:
        return "path is empty" if not path else "path holds a zero byte"
    # A manifest must not bring files from outside the site folder into training. Backslashes count as
    # well, since a table may have been written on Windows.
    if PurePath(path).is_absolute() or ".." in path.replace("\\", "/").split("/"):
        return f"{path!r} leads out of the site folder; write it relative to the folder"
    full = Path(root, path)
    try:
        status = full.lstat()
        parent = full.parent
        if parent not in inside:
            inside[parent] = _is_inside(root, parent)
        stays = inside[parent]
        # Links are looked at one by one only where there are any: resolving every path would take several
        # calls per image.
        if stat.S_ISLNK(status.st_mode):
            status, stays = full.stat(), stays and _is_inside(root, full)
    except OSError as error:
        return f"{path!r}: {error.strerror or error}"
    if not stays:
        return f"{path!r} is a link that leads out of the site folder"
    return "" if stat.S_ISREG(status.st_mode) else f"{path!r} is not a file"


def _is_inside(root: str, path: Path) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(root + os.sep)


def _collect_counts(
    table: CsvTable, hierarchy: Hierarchy, faults: list[Fault]
) -> dict[str, NDArray[np.int64]]:
    """Return the leaf counts, shape (C_L,), of every bag that bags.csv names."""
    counts: dict[str, NDArray[np.int64]] = {}
    seen: set[tuple[str, str]] = set()
    for line, row in table:
        bag, label, text = row["bag_id"], row["label"], row["count"]
        vector = counts.setdefault(bag, np.zeros(hierarchy.sizes[-1], dtype=np.int64))
        leaf, number = hierarchy.leaf_index.get(label), whole_number(text)
        reason = ""
        if leaf is None:
            reason = unknown_label(label, hierarchy)
        elif number is None:
            reason = f"count {text!r} is not a whole number >= 0"
        elif (bag, label) in seen:
            reason = f"label {label!r} is counted twice in bag {bag!r}"
        if reason or number is None:
            faults.append(Fault(BadRow(table.file, line, reason), bag))
            continue
        seen.add((bag, label))
        vector[leaf] = number
    return counts


def _cross_check(
    manifest: CsvTable,
    bags: CsvTable,
    counts: dict[str, NDArray[np.int64]],
    minimum: int,
    faults: list[Fault],
) -> None:
    """Add the faults between the two files, unless a bag is faulty already."""
    spoilt = {fault.bag for fault in faults}
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    for line, row in manifest:
        first.setdefault(row["bag_id"], line)
        sizes[row["bag_id"]] = sizes.get(row["bag_id"], 0) + 1
    first_count: dict[str, int] = {}
    for line, row in bags:
        first_count.setdefault(row["bag_id"], line)

    def report(file: str, line: int, bag: str, reason: str) -> None:
        faults.append(Fault(BadRow(file, line, f"bag {bag!r} {reason}"), bag))

    for bag, size in sizes.items():
        if bag in spoilt:
            continue
        if bag not in counts:
            report(manifest.file, first[bag], bag, f"has no row in {bags.file}")
        elif int(counts[bag].sum()) != size:
            reason = f"counts {int(counts[bag].sum())} images, {manifest.file} lists {size}"
            report(bags.file, first_count[bag], bag, reason)
        elif size < minimum:
            report(manifest.file, first[bag], bag, f"holds {size} image(s), the minimum is {minimum}")
    for bag in counts:
        if bag not in sizes and bag not in spoilt:
            report(bags.file, first_count[bag], bag, f"has no row in {manifest.file}")
