"""Report what a build of site folders did, and what that means for the unit of a privacy statement."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.sources.partition import Indices
from client.sources.site_writer import SitePlan
from client.sources.source_table import SourceTable


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
