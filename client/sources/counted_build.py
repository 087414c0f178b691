"""Build one site folder from counted bags.

The images are checked, bags with faults are left out where that is asked for, and the rest is written and
reported. The site folder holds images under numbers, the bag of each and the counts of each bag. A label of a
single image is nowhere, since nobody knows one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from client.bags import write_quarantine
from client.csv_tables import write_csv
from client.image_cache import Progress
from client.site import SiteConfig, SitePolicy
from client.site_files import MANIFEST_FILE, Fault
from client.sources.build_steps import Steps, image_faults, refuse_existing, whole_or_nothing
from client.sources.counts import CountedBags
from client.sources.dicom import MixedImages
from client.sources.report import BuildReport, SiteReport
from client.sources.site_writer import write_counts, write_images
from common.errors import BadRow, DataError, UserError


def build_counted_site(
    bags: CountedBags,
    out: Path,
    name: str,
    *,
    minimum_bag_size: int = 4,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Add the site folder ``out/name``, or nothing at all.

    Args:
        bags: what the hospital has.
        out: folder of site folders; made if missing.
        name: of the site, also its folder.
        minimum_bag_size: images; the site's policy.
        skip_bad: leave out every bag with a fault, and list the faults in the site's quarantine.csv.
        progress: called with (done, all); every image counts once for checking, once for writing.

    Raises:
        DataError: faults, all of them; or no bag is left.
        UserError: the name cannot be one, ``out/name`` exists, or the disk refuses.
    """
    try:
        config = SiteConfig(name=name, policy=SitePolicy(minimum_bag_size=minimum_bag_size))
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
        files = write_images(folder, "images", images, used, np.arange(len(used)), step)
        listed = [
            (file, bags.bag_ids[bag_of[index]]) for file, index in zip(files, used.tolist(), strict=True)
        ]
        write_csv(folder / MANIFEST_FILE, ("path", "bag_id"), listed)
        write_quarantine(folder, rows)
    sizes = [len(bags.images[number]) for number in good]
    return BuildReport(
        out=target,
        sites=(
            SiteReport(
                name=name,
                bags=len(sizes),
                images=sum(sizes),
                test_images=0,
                bag_size_min=min(sizes),
                bag_size_mean=round(sum(sizes) / len(sizes), 2),
                bag_size_max=max(sizes),
            ),
        ),
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
