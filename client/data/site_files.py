"""Parse the tables of a site folder and check them against one another, without opening images.

Every fault is a row that the user can find. Faults that make a whole file unusable are raised at once
(all of them together); the others are returned with the bag they concern, and the caller decides.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from client.data.tables import CsvTable, read_csv, refuse_twins, unknown_label, whole_number
from client.site import BUILD_ADVICE, SiteConfig
from common.errors import BadRow, DataError
from common.hierarchy import Hierarchy

MANIFEST_FILE, BAGS_FILE, TEST_FILE = "manifest.csv", "bags.csv", "test.csv"


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
        refuse_twins(tree, config.hierarchy)
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


def fingerprint(site_dir: Path, files: Sequence[str], images: Sequence[_ImageRow]) -> str:
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
    return fingerprint(site_dir, (MANIFEST_FILE, BAGS_FILE, config.hierarchy), listing.images)


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
