"""Write one site folder, as docs/data.md describes it, from a plan of the images of each site.

Report what a build of site folders did, and what that means for the unit of a privacy statement.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.site_files import BAGS_FILE, MANIFEST_FILE, TEST_FILE
from client.data.tables import write_csv
from client.site import SiteConfig, SitePolicy
from common.hierarchy import Hierarchy
from deploy.datasets.files import SourceImages, SourceTable
from deploy.datasets.partition import Indices


@dataclass(frozen=True)
class SitePlan:
    """Hold the training bags and test images of one site, as indices into the source."""

    name: str
    bags: list[Indices]
    test: Indices


def write_site(
    folder: Path,
    source: SourceTable,
    plan: SitePlan,
    groups: Sequence[str] | None,
    minimum_bag_size: int,
    rng: np.random.Generator,
    step: Callable[[], None],
) -> None:
    """Write site.toml, hierarchy.csv, manifest.csv, bags.csv, images/, and test.csv with test/.

    Files are numbered in random order, and groups by first appearance in the manifest, so that no name
    or order tells a label, a patient or the original file.

    Raises:
        OSError: the disk is full or refuses.
    """
    folder.mkdir()
    leaves = source.hierarchy.classes[-1]
    width = max(4, len(str(len(plan.bags))))
    bag_ids = [f"b{number:0{width}d}" for number in range(1, len(plan.bags) + 1)]
    counts = np.stack([np.bincount(source.labels[bag], minlength=len(leaves)) for bag in plan.bags])
    config = SiteConfig(name=plan.name, policy=SitePolicy(minimum_bag_size=minimum_bag_size))
    write_counts(folder, config, source.hierarchy, bag_ids, counts)

    bag_of = np.repeat(np.arange(len(plan.bags)), [len(bag) for bag in plan.bags])
    members = np.concatenate(plan.bags)
    order = rng.permutation(len(members))
    paths = write_images(folder, "images", source.images, members, order, step)
    header = ["path", "bag_id"]
    rows = [[path, bag_ids[bag]] for path, bag in zip(paths, bag_of.tolist(), strict=True)]
    if groups is not None:
        header.append("patient_id")
        opaque: dict[str, str] = {}
        for row, index in zip(rows, members.tolist(), strict=True):
            row.append(opaque.setdefault(groups[index], f"p{len(opaque) + 1:04d}"))
    write_csv(folder / MANIFEST_FILE, header, rows)
    if len(plan.test):
        test = rng.permutation(plan.test)
        order = rng.permutation(len(test))
        test_paths = write_images(folder, "test", source.images, test, order, step)
        labels = [leaves[label] for label in source.labels[test].tolist()]
        write_csv(folder / TEST_FILE, ("path", "label"), list(zip(test_paths, labels, strict=True)))


def write_counts(
    folder: Path,
    config: SiteConfig,
    hierarchy: Hierarchy,
    bag_ids: Sequence[str],
    counts: NDArray[np.int64],
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
    folder: Path,
    name: str,
    images: SourceImages,
    indices: Indices,
    order: Indices,
    step: Callable[[], None],
) -> list[str]:
    """Write images as ``name/000001.png`` and so on, and return their relative paths.

    Args:
        folder: the site folder.
        name: the folder to make in it.
        images: what to write from.
        indices: shape (n,), the images to write.
        order: shape (n,), the position in ``indices`` of the first file, the second, and so on.
        step: called for every image written.

    Raises:
        OSError: the disk is full or refuses.
    """
    (folder / name).mkdir()
    paths = [""] * len(indices)
    for number, position in enumerate(order.tolist(), start=1):
        suffix = images.write(int(indices[position]), folder / name / f"{number:06d}")
        paths[position] = f"{name}/{number:06d}{suffix}"
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


def make_report(
    source: SourceTable,
    out: Path,
    plans: Sequence[SitePlan],
    groups: Sequence[str] | None,
    tested: Indices,
    quarantined: int,
) -> BuildReport:
    """Summarise the site folders that were written.

    Args:
        source: the table that was divided.
        out: the folder of the sites.
        plans: the sites as they were written.
        groups: the group of every image, or None.
        tested: the test images.
        quarantined: number of bad rows.
    """
    reports = []
    bags_of: dict[str, int] = {}
    for plan in plans:
        sizes = [len(bag) for bag in plan.bags]
        reports.append(
            SiteReport(
                name=plan.name,
                bags=len(sizes),
                images=sum(sizes),
                test_images=len(plan.test),
                bag_size_min=min(sizes),
                bag_size_mean=round(sum(sizes) / len(sizes), 2),
                bag_size_max=max(sizes),
            )
        )
        if groups is not None:
            for bag in plan.bags:
                for group in {groups[index] for index in bag.tolist()}:
                    bags_of[group] = bags_of.get(group, 0) + 1
    notes = list(source.notes)
    if groups is None:
        notes.append(
            "No patient or lesion ids were given: images of one patient may lie in several bags, and a "
            "privacy statement per bag is not one per patient."
        )
    else:
        divided = sum(number > 1 for number in bags_of.values())
        notes.append(
            f"{divided} of {len(bags_of)} groups lie in several bags (at most {max(bags_of.values())}): a "
            "privacy statement per bag covers such a group only in part."
            if divided
            else f"Each of the {len(bags_of)} groups lies in one bag: the bag covers whole groups."
        )
        test_groups = {groups[index] for index in tested.tolist()}
        if shared := len(test_groups & set(bags_of)):
            notes.append(f"{shared} group(s) have images on both sides of the split.")
    return BuildReport(
        out=out,
        sites=tuple(reports),
        listed=len(source) + len(source.bad),
        used=sum(report.images + report.test_images for report in reports),
        quarantined=quarantined,
        max_bags_per_group=max(bags_of.values()) if bags_of else None,
        notes=tuple(notes),
    )
