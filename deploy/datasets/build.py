"""Build site folders from a source table.

The images are checked, divided, written and reported. No instance label of a training image is written
anywhere: files get numbers in random order, bags get counts. Only rows that the split column calls test keep
their label, in test.csv.

Check images, count progress, and write all or nothing, as every build of site folders does.
"""

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.bags import write_quarantine
from client.data.image_cache import CHUNK, Progress
from client.data.tables import refuse_twins
from common.errors import BadRow, DataError, UserError
from common.files import new_folder
from deploy.datasets.files import TEST_WORDS, TRAIN_WORDS, SourceImages, SourceTable, image_fault
from deploy.datasets.partition import (
    Indices,
    column,
    divide,
    groups_of,
    is_missing,
    make_bags,
)
from deploy.datasets.site_writer import BuildReport, SitePlan, make_report, write_site


class Steps:
    """Count the work done, for the progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, number: int = 1) -> None:
        """Count ``number`` more steps as done."""
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


def image_faults(images: SourceImages, number: int, step: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Decode images 0 to ``number - 1`` once, and yield index and fault of every unusable one."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Pillow only warns of an image of 90 to 180 million pixels; here it is a bad image.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, number, CHUNK):
            chunk = range(start, min(start + CHUNK, number))
            faults = pool.map(lambda index: image_fault(images, index), chunk)
            yield from ((index, fault) for index, fault in zip(chunk, faults, strict=True) if fault)
            step(len(chunk))


def refuse_existing(target: Path, option: str) -> None:
    """Refuse a ``target`` that exists already, naming the option that chose it.

    Raises:
        UserError: there is something at ``target``.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; remove it or choose another {option}")


@contextmanager
def whole_or_nothing(target: Path, needed: Callable[[], int]) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` only when the block ends without a fault.

    Args:
        target: the folder to make; its parents are made.
        needed: bytes that a complete ``target`` takes, for the message about a full disk.

    Raises:
        UserError: the disk is full or refuses.
    """
    try:
        with new_folder(target) as temporary:
            yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {target} needs about {needed():,} bytes. Free some space, or choose "
                "another --out."
            ) from error
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error


def build_sites(
    source: SourceTable,
    out: Path,
    *,
    bag_size: int = 16,
    sites: int | None = None,
    partition: str = "iid",
    bags: str = "random",
    group_column: str | None = None,
    groups: str = "bags",
    split_column: str | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    minimum_bag_size: int = 4,
    missing_groups: str = "refuse",
    progress: Progress | None = None,
) -> BuildReport:
    """Write one site folder per site under ``out``, or nothing at all.

    Args:
        source: images with leaf labels.
        out: folder to make; it must not exist.
        bag_size: images per bag; see ``deploy.datasets.partition.fill_bags`` for bags with groups.
        sites: number of sites (5 if None); with ``column:NAME`` the column's values decide.
        partition: ``iid``, ``dirichlet:ALPHA`` (per leaf class) or ``column:NAME``.
        bags: ``random``, ``column:NAME`` (a bag holds one value) or ``similarity``.
        group_column: patient or lesion ids: a group is never divided over sites, except where a
            column partition or the split does so, which the report notes. The source's own if None.
        groups: ``bags``: a group is not divided over bags either; ``sites``: bags are filled image by
            image, whatever the groups.
        split_column: rows that it calls test become test.csv. The source's own if None.
        seed: fixes the result.
        skip_bad: leave bad rows out and list them in ``out/quarantine.csv``.
        minimum_bag_size: images; no smaller bag is made, and the site's policy will refuse them.
        missing_groups: ``refuse``: images without a cell in the group column are bad rows; ``alone``: each is
            a group of its own, which the report notes.
        progress: called with (done, all); every image counts once for checking, once for writing.

    Raises:
        DataError: bad rows, all of them.
        UserError: a wrong option, ``out`` exists or cannot be written, or too few images.
    """
    if not 1 <= minimum_bag_size <= bag_size:
        raise UserError(f"bag size {bag_size}: it must be at least the minimum bag size, {minimum_bag_size}")
    refuse_existing(out, "--out")
    bad = list(source.bad)
    steps = Steps(2 * len(source), progress)
    refuse_twins(source.hierarchy, source.file)
    is_train, is_test = read_split(source, split_column or source.split_column, bad)
    group_column = group_column or source.group_column
    good, note = _known_groups(source, group_column, missing_groups, bad)
    for option in (partition, bags):
        kind, _, name = option.partition(":")
        if kind == "column" and name:
            good &= _filled_in(source, name, "", bad)
    good &= _check_images(source, bad, steps)
    if bad and not skip_bad:
        raise DataError(
            f"{source.file} holds {len(bad)} bad row(s)",
            sorted(bad, key=lambda row: row.row or 0),
            "Mend these rows, or leave them out with --skip-bad.",
        )
    return write_sites(
        replace(source, notes=(*source.notes, *note)),
        out,
        np.flatnonzero(is_train & good),
        np.flatnonzero(is_test & good),
        bag_size=bag_size,
        sites=sites,
        partition=partition,
        bags=bags,
        group_column=group_column,
        groups=groups,
        seed=seed,
        minimum_bag_size=minimum_bag_size,
        bad=bad,
        step=steps,
    )


def write_sites(
    source: SourceTable,
    out: Path,
    train: Indices,
    test: Indices,
    *,
    bag_size: int,
    sites: int | None,
    partition: str,
    bags: str,
    group_column: str | None,
    groups: str,
    seed: int,
    minimum_bag_size: int,
    bad: Sequence[BadRow] = (),
    step: Callable[[], None] = lambda: None,
) -> BuildReport:
    """Divide and write images that are known to be usable, as the second half of ``build_sites``.

    Args:
        source: images with leaf labels.
        out: folder to make; it must not exist.
        train: indices of the training images to use.
        test: indices of the test images to use.
        bag_size: as in build_sites, like the arguments up to ``minimum_bag_size``.
        sites: number of sites.
        partition: division into sites.
        bags: division into bags.
        group_column: patient or lesion ids.
        groups: what no group is divided over.
        seed: fixes the result.
        minimum_bag_size: images; no smaller bag is made.
        bad: rows for ``out/quarantine.csv``.
        step: called for every image written.

    Raises:
        UserError: see build_sites.
    """
    if groups not in ("bags", "sites"):
        raise UserError(f"--groups {groups!r}: write bags or sites: what no group is divided over")
    refuse_existing(out, "--out")
    rng = np.random.default_rng(seed)
    chosen = group_column or source.group_column
    group_of = groups_of(source, chosen) if chosen else None
    if not len(train):
        raise DataError(f"{source.file} holds no usable training image", bad)
    names, parts = divide(source, train, test, group_of, partition, sites, bag_size, rng)
    plans = []
    for name, (units, test_images) in zip(names, parts, strict=True):
        if groups == "sites":
            units = [np.array([index]) for unit in units for index in unit.tolist()]
        made = make_bags(source, units, bags, bag_size, minimum_bag_size, rng)
        if not made or min(len(bag) for bag in made) < minimum_bag_size:
            raise UserError(
                f"site {name!r} would hold {sum(len(unit) for unit in units)} training image(s), too few "
                f"for one bag of {minimum_bag_size}: ask for fewer sites, or a larger ALPHA"
            )
        plans.append(SitePlan(name, made, test_images))
    _write_all(source, out, plans, group_of, minimum_bag_size, bad, rng, step)
    return make_report(source, out, plans, group_of, test, len(bad))


def read_split(
    source: SourceTable, name: str | None, bad: list[BadRow]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for every image whether it is a training row and whether it is a test row.

    Without a column all are training rows.

    Args:
        source: the images.
        name: the split column, if there is one.
        bad: receives the rows whose word is neither.
    """
    if name is None:
        return np.ones(len(source), dtype=np.bool_), np.zeros(len(source), dtype=np.bool_)
    words = [cell.lower() for cell in column(source, name)]
    is_train = np.array([word in TRAIN_WORDS for word in words], dtype=np.bool_)
    is_test = np.array([word in TEST_WORDS for word in words], dtype=np.bool_)
    # Not guessed: a test image taken for a training image would spoil every figure of the test.
    for index in np.flatnonzero(~is_train & ~is_test).tolist():
        reason = f"{name} {words[index]!r} is neither train, val nor test"
        bad.append(BadRow(source.file, source.lines[index], reason))
    return is_train, is_test


def _known_groups(
    source: SourceTable, name: str | None, missing_groups: str, bad: list[BadRow]
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return for every image, shape (N,), whether its group allows its use, and what to note of it."""
    if missing_groups not in ("refuse", "alone"):
        raise UserError(f"--missing-groups {missing_groups!r}: write refuse or alone")
    if name is None:
        return np.ones(len(source), dtype=np.bool_), ()
    if missing_groups == "refuse":
        return _filled_in(source, name, ": whose image is it? (--missing-groups alone)", bad), ()
    alone = sum(map(is_missing, column(source, name)))
    note = f"{alone} image(s) without {name} are each a group of its own: patients among them may be divided."
    return np.ones(len(source), dtype=np.bool_), (note,) if alone else ()


def _filled_in(source: SourceTable, name: str, meaning: str, bad: list[BadRow]) -> NDArray[np.bool_]:
    """Return for every image whether its cell of a column is filled, and add the other rows to ``bad``."""
    cells = column(source, name)
    filled = np.array([not is_missing(cell) for cell in cells], dtype=np.bool_)
    for index in np.flatnonzero(~filled).tolist():
        reason = f"{name} is {'missing' if cells[index] else 'empty'}{meaning}"
        bad.append(BadRow(source.file, source.lines[index], reason))
    return filled


def _check_images(source: SourceTable, bad: list[BadRow], steps: Steps) -> NDArray[np.bool_]:
    """Decode every image once, and return for each, shape (N,), whether it can be used."""
    good = np.ones(len(source), dtype=np.bool_)
    for index, fault in image_faults(source.images, len(source), steps):
        good[index] = False
        bad.append(BadRow(source.file, source.lines[index], fault))
    return good


def _write_all(
    source: SourceTable,
    out: Path,
    plans: Sequence[SitePlan],
    groups: Sequence[str] | None,
    minimum_bag_size: int,
    bad: Sequence[BadRow],
    rng: np.random.Generator,
    step: Callable[[], None],
) -> None:
    """Write all sites to a temporary folder and rename it to ``out``, or leave nothing."""

    def needed() -> int:
        parts = (part for plan in plans for part in (*plan.bags, plan.test))
        return sum(source.images.size(index) for part in parts for index in part.tolist())

    with whole_or_nothing(out, needed) as temporary:
        for plan in plans:
            write_site(temporary / plan.name, source, plan, groups, minimum_bag_size, rng, step)
        write_quarantine(temporary, list(bad))
