"""Build site folders of images with labels, of any source, or of synthetic hospitals.

The images are checked, divided, written and reported, all or nothing. No instance label of a training image
is written anywhere: files get numbers in random order, bags get counts. Only rows that the split column calls
test keep their label, in test.csv.
"""

import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.bags import write_quarantine
from client.data.images import Progress
from client.data.tables import refuse_duplicate_names
from client.site import site_folders
from common.config import RunConfig
from common.errors import BadRow, DataError, UserError
from deploy.datasets.files import TEST_WORDS, TRAIN_WORDS, SourceTable
from deploy.datasets.options import Division, SourceKind, SourceOptions, SyntheticHospitals
from deploy.datasets.partition import Split, column, divide, groups_of, is_missing, make_bags
from deploy.datasets.site_writer import (
    BuildPlan,
    BuildReport,
    SitePlan,
    Steps,
    image_faults,
    make_report,
    refuse_existing,
    whole_or_nothing,
    write_site,
)
from deploy.lazy import lazy_imports

# Each source runs only when it is used: some need slow or optional packages.
with lazy_imports():
    from deploy.datasets import archive, dicom, fine_grained, synthetic, table


def open_source(options: SourceOptions, hospitals: SyntheticHospitals = SyntheticHospitals()) -> SourceTable:
    """Open a source of labelled images as one table.

    Args:
        options: which images and labels; any kind but COUNTS, which has no label to make a table of.
        hospitals: what to draw where the kind is SYNTHETIC.

    Raises:
        UserError: an unknown kind, a path that is missing or that this source would ignore; and what the
            source itself raises.
    """
    try:
        kind = SourceKind(options.kind)
    except ValueError:
        raise UserError(f"unknown source {options.kind!r}; known are: {', '.join(SourceKind)}") from None
    if kind is SourceKind.COUNTS:
        raise UserError("--source counts has no labels: `fedbags bags build` reads it by itself")
    from_table = kind in (SourceKind.TABLE, SourceKind.DICOM)
    given = {
        "--labels": options.labels,
        "--label-column": options.label_column,
        "--hierarchy": options.hierarchy,
        "--levels": options.depth,
        "--fold-case": options.fold_case or None,
    }
    others = {SourceKind.MEDMNIST: {"--hierarchy"}, SourceKind.FOLDERS: {"--fold-case"}}
    takes = set(given) if from_table else others.get(kind, set())
    # An option that is ignored would leave the user with another data set than asked for.
    if ignored := [name for name, value in given.items() if value is not None and name not in takes]:
        raise UserError(f"--source {kind} does not read {', '.join(ignored)}")
    if kind is SourceKind.SYNTHETIC:
        if options.images is not None:
            raise UserError("--source synthetic draws its images; it does not read --images")
        return synthetic.synthetic_source(hospitals)
    if options.images is None or (from_table and options.labels is None):
        raise UserError(f"--source {kind} needs --images" + (" and --labels" if from_table else ""))
    images = Path(options.images)
    hierarchy = None if options.hierarchy is None else Path(options.hierarchy)
    readers: dict[SourceKind, Callable[[], SourceTable]] = {
        SourceKind.TABLE: lambda: table.table_source(options),
        SourceKind.DICOM: lambda: dicom.dicom_source(options),
        SourceKind.FOLDERS: lambda: table.folder_source(images, fold_case=options.fold_case),
        SourceKind.MEDMNIST: lambda: archive.medmnist_source(images, hierarchy),
        SourceKind.ARCHIVE: lambda: archive.archive_source(images),
        SourceKind.CUB: lambda: fine_grained.cub_source(images),
        SourceKind.AIRCRAFT: lambda: fine_grained.aircraft_source(images),
        SourceKind.CARS: lambda: fine_grained.cars_source(images),
    }
    return readers[kind]()


def build_sites(
    source: SourceTable,
    out: Path,
    division: Division = Division(),
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Write one site folder per site under ``out``, or nothing at all.

    Args:
        source: images with leaf labels.
        out: folder to make; it must not exist.
        division: into sites and bags.
        skip_bad: leave bad rows out and list them in ``out/quarantine.csv``.
        progress: called with (done, all); every image counts once for checking, once for writing.

    Raises:
        DataError: bad rows, all of them.
        UserError: a wrong option, ``out`` exists or cannot be written, or too few images.
    """
    fewest = division.minimum_bag_size
    if not 1 <= fewest <= division.bag_size:
        raise UserError(f"bag size {division.bag_size}: it must be at least the minimum bag size, {fewest}")
    refuse_existing(out, "--out")
    bad = list(source.bad)
    steps = Steps(2 * len(source), progress)
    refuse_duplicate_names(source.hierarchy, source.file)
    is_train, is_test = read_split(source, division.split_column or source.split_column, bad)
    group_column = division.group_column or source.group_column
    good, note = _known_groups(source, group_column, division.missing_groups, bad)
    for option in (division.partition, division.bags):
        kind, _, name = option.partition(":")
        if kind == "column" and name:
            good &= _filled_in(source, name, "", bad)
    for index, fault in image_faults(source.images, len(source), steps):
        good[index] = False
        bad.append(BadRow(source.file, source.lines[index], fault))
    if bad and not skip_bad:
        raise DataError(
            f"{source.file} holds {len(bad)} bad row(s)",
            sorted(bad, key=lambda row: row.row or 0),
            "Mend these rows, or leave them out with --skip-bad.",
        )
    split = Split(np.flatnonzero(is_train & good), np.flatnonzero(is_test & good), tuple(bad))
    return write_sites(replace(source, notes=(*source.notes, *note)), out, division, split, steps)


def write_sites(
    source: SourceTable, out: Path, division: Division, split: Split, step: Callable[[], None] = lambda: None
) -> BuildReport:
    """Divide and write images that are known to be usable, as the second half of ``build_sites``.

    Args:
        source: images with leaf labels.
        out: folder to make; it must not exist.
        division: into sites and bags; its split column is not read any more.
        split: the images to use, and bad rows for ``out/quarantine.csv``.
        step: called for every image written.

    Raises:
        UserError: see build_sites.
    """
    if division.groups not in ("bags", "sites"):
        raise UserError(f"--groups {division.groups!r}: write bags or sites: what no group is divided over")
    refuse_existing(out, "--out")
    rng = np.random.default_rng(division.seed)
    chosen = division.group_column or source.group_column
    groups = groups_of(source, chosen) if chosen else None
    if not len(split.train):
        raise DataError(f"{source.file} holds no usable training image", split.bad)
    names, parts = divide(source, split, groups, division, rng)
    sites = []
    for name, (units, test_images) in zip(names, parts, strict=True):
        if division.groups == "sites":
            units = [np.array([index]) for unit in units for index in unit.tolist()]
        made = make_bags(source, units, division, rng)
        if not made or min(len(bag) for bag in made) < division.minimum_bag_size:
            raise UserError(
                f"site {name!r} would hold {sum(len(unit) for unit in units)} training image(s), too few "
                f"for one bag of {division.minimum_bag_size}: ask for fewer sites, or a larger ALPHA"
            )
        sites.append(SitePlan(name, made, test_images))
    plan = BuildPlan(source, split, sites, groups, division.minimum_bag_size)
    with whole_or_nothing(out, plan.size) as temporary:
        for site in sites:
            write_site(temporary / site.name, plan, site, rng, step)
        write_quarantine(temporary, list(split.bad))
    return make_report(out, plan)


def write_synthetic_sites(
    out: Path, hospitals: SyntheticHospitals = SyntheticHospitals(), progress: Progress | None = None
) -> None:
    """Write complete site folders ``out/hospital-K`` of synthetic lesions, one bag per session.

    Raises:
        UserError: ``out`` exists, or cannot be written.
    """
    build_sites(synthetic.synthetic_source(hospitals), out, hospitals.division, progress=progress)


def kept_synthetic_sites(config: RunConfig) -> list[Path]:
    """Return the folders of a configuration's synthetic hospitals, drawn once and kept in the user's home."""
    sites, size, seed = config.federation.sites, config.model.image_size, config.seed
    root = Path.home() / ".fedbags" / "synthetic"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        # Several processes may ask at once, and drawing takes a while.
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = root / f"sites-{sites}-pixels-{size}-seed-{seed}"
        if not target.exists():
            write_synthetic_sites(target, SyntheticHospitals(sites, seed, image_size=size))
    return site_folders(target)


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
