"""Check images, write site folders as docs/data.md describes them, all or nothing, and report what was done.

Shared by images with labels, which are divided first (``deploy.datasets.build``), and by bags that come with
counts (``deploy.datasets.counts``). The report says what the division means for the unit of a privacy
statement.
"""

import errno
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.images import CHUNK, Progress
from client.data.tables import BAGS_FILE, MANIFEST_FILE, TEST_FILE
from client.site import SiteConfig, SitePolicy
from common.errors import UserError, writable
from common.files import new_folder, write_csv
from common.hierarchy import Hierarchy
from deploy.datasets.files import SourceImages, SourceTable, image_fault
from deploy.datasets.partition import Indices, Split


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
    with writable(target, advice=""):
        try:
            with new_folder(target) as temporary:
                yield temporary
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk is full: {target} needs about {needed():,} bytes. Free some space, or choose "
                    "another --out."
                ) from error
            raise


@dataclass(frozen=True)
class SitePlan:
    """Hold the training bags and test images of one site, as indices into the source."""

    name: str
    bags: list[Indices]
    test: Indices


@dataclass(frozen=True)
class BuildPlan:
    """Hold what a build is about to write.

    Attributes:
        source: the table that was divided.
        split: its images in use.
        sites: their division into sites and bags.
        groups: the group of every image of the source, or None.
        minimum_bag_size: images; goes into the sites' policy.
    """

    source: SourceTable
    split: Split
    sites: Sequence[SitePlan]
    groups: Sequence[str] | None
    minimum_bag_size: int

    def size(self) -> int:
        """Return about how many bytes the images take."""
        parts = (part for site in self.sites for part in (*site.bags, site.test))
        return sum(self.source.images.size(index) for part in parts for index in part.tolist())


def write_site(
    folder: Path, plan: BuildPlan, site: SitePlan, rng: np.random.Generator, step: Callable[[], None]
) -> None:
    """Write site.toml, hierarchy.csv, manifest.csv, bags.csv, images/, and test.csv with test/.

    Files are numbered in random order, and groups by first appearance in the manifest, so that no name
    or order tells a label, a patient or the original file.

    Raises:
        OSError: the disk is full or refuses.
    """
    folder.mkdir()
    source = plan.source
    leaves = source.hierarchy.classes[-1]
    width = max(4, len(str(len(site.bags))))
    bag_ids = [f"b{number:0{width}d}" for number in range(1, len(site.bags) + 1)]
    counts = np.stack([np.bincount(source.labels[bag], minlength=len(leaves)) for bag in site.bags])
    config = SiteConfig(name=site.name, policy=SitePolicy(minimum_bag_size=plan.minimum_bag_size))
    write_counts(folder, config, source.hierarchy, bag_ids, counts)

    bag_of = np.repeat(np.arange(len(site.bags)), [len(bag) for bag in site.bags])
    members = np.concatenate(site.bags)
    paths = write_images(folder / "images", source.images, members, rng.permutation(len(members)), step)
    header = ["path", "bag_id"]
    rows = [[path, bag_ids[bag]] for path, bag in zip(paths, bag_of.tolist(), strict=True)]
    if plan.groups is not None:
        header.append("patient_id")
        opaque: dict[str, str] = {}
        for row, index in zip(rows, members.tolist(), strict=True):
            row.append(opaque.setdefault(plan.groups[index], f"p{len(opaque) + 1:04d}"))
    write_csv(folder / MANIFEST_FILE, header, rows)
    if len(site.test):
        test = rng.permutation(site.test)
        test_paths = write_images(folder / "test", source.images, test, rng.permutation(len(test)), step)
        labels = [leaves[label] for label in source.labels[test].tolist()]
        write_csv(folder / TEST_FILE, ("path", "label"), list(zip(test_paths, labels, strict=True)))


def write_counts(
    folder: Path, config: SiteConfig, hierarchy: Hierarchy, bag_ids: Sequence[str], counts: NDArray[np.int64]
) -> None:
    """Write site.toml, hierarchy.csv and bags.csv.

    Args:
        folder: the site folder.
        config: name and policy of the site.
        hierarchy: the label tree.
        bag_ids: the name of every bag.
        counts: shape (bags, C_L), images per leaf.
    """
    config.save(folder)
    hierarchy.to_csv(folder / config.hierarchy)
    leaves = hierarchy.classes[-1]
    rows = [
        (bag_id, leaves[leaf], counted[leaf])
        for bag_id, counted in zip(bag_ids, counts, strict=True)
        for leaf in np.flatnonzero(counted)
    ]
    write_csv(folder / BAGS_FILE, ("bag_id", "label", "count"), rows)


def write_images(
    folder: Path, images: SourceImages, indices: Indices, order: Indices, step: Callable[[], None]
) -> list[str]:
    """Write images as ``000001.png`` and so on, and return their paths from the site folder.

    Args:
        folder: the folder of the site to make.
        images: what to write from.
        indices: shape (n,), the images to write.
        order: shape (n,), the position in ``indices`` of the first file, the second, and so on.
        step: called for every image written.

    Raises:
        OSError: the disk is full or refuses.
    """
    folder.mkdir()
    paths = [""] * len(indices)
    for number, position in enumerate(order.tolist(), start=1):
        suffix = images.write(int(indices[position]), folder / f"{number:06d}")
        paths[position] = f"{folder.name}/{number:06d}{suffix}"
        step()
    return paths


@dataclass(frozen=True)
class SiteReport:
    """Summarise one site folder, in numbers of images unless another unit is named."""

    name: str
    bags: int
    images: int
    test_images: int
    bag_size_min: int
    bag_size_mean: float
    bag_size_max: int

    @classmethod
    def of(cls, name: str, bags: Sequence[int], test_images: int) -> Self:
        """Return the summary of a site with these numbers of images in its bags."""
        mean = round(sum(bags) / len(bags), 2)
        return cls(name, len(bags), sum(bags), test_images, min(bags), mean, max(bags))


@dataclass(frozen=True)
class BuildReport:
    """Summarise all site folders of a build.

    ``max_bags_per_group`` is 1 where every group lies in one bag, and None where no groups were given.
    """

    out: Path
    sites: tuple[SiteReport, ...]
    listed: int
    used: int
    quarantined: int
    max_bags_per_group: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a form that can be written as JSON."""
        return {**asdict(self), "out": str(self.out)}


def make_report(out: Path, plan: BuildPlan) -> BuildReport:
    """Summarise the site folders that were written below ``out``."""
    source, groups = plan.source, plan.groups
    sites = tuple(SiteReport.of(s.name, [len(bag) for bag in s.bags], len(s.test)) for s in plan.sites)
    notes = list(source.notes)
    bags_of: Counter[str] = Counter()
    if groups is None:
        notes.append(
            "No patient or lesion ids were given: images of one patient may lie in several bags, and a "
            "privacy statement per bag is not one per patient."
        )
    else:
        for site in plan.sites:
            for bag in site.bags:
                bags_of.update({groups[index] for index in bag.tolist()})
        divided = sum(number > 1 for number in bags_of.values())
        notes.append(
            f"{divided} of {len(bags_of)} groups lie in several bags (at most {max(bags_of.values())}): a "
            "privacy statement per bag covers such a group only in part."
            if divided
            else f"Each of the {len(bags_of)} groups lies in one bag: the bag covers whole groups."
        )
        test_groups = {groups[index] for index in plan.split.test.tolist()}
        if shared := len(test_groups & set(bags_of)):
            notes.append(f"{shared} group(s) have images on both sides of the split.")
    return BuildReport(
        out=out,
        sites=sites,
        listed=len(source) + len(source.bad),
        used=sum(site.images + site.test_images for site in sites),
        quarantined=len(plan.split.bad),
        max_bags_per_group=max(bags_of.values()) if bags_of else None,
        notes=tuple(notes),
    )
