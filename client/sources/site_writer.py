"""Writes one site folder of the data contract from a plan of which image goes where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.csv_tables import write_csv
from client.site import SiteConfig, SitePolicy
from client.site_files import BAGS_FILE, MANIFEST_FILE, TEST_FILE
from client.sources.partition import Indices
from client.sources.source_table import SourceTable


@dataclass(frozen=True)
class SitePlan:
    """The images of one site: training bags, and test images, as indices into the source."""

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
    policy = SitePolicy(minimum_bag_size=minimum_bag_size)
    SiteConfig(name=plan.name, policy=policy).save(folder)
    source.hierarchy.to_csv(folder / "hierarchy.csv")
    leaves = source.hierarchy.classes[-1]

    bag_of = np.repeat(np.arange(len(plan.bags)), [len(bag) for bag in plan.bags])
    paths = _write_images(folder, "images", source, np.concatenate(plan.bags), rng, step)
    width = max(4, len(str(len(plan.bags))))
    bag_ids = [f"b{number:0{width}d}" for number in range(1, len(plan.bags) + 1)]
    header = ["path", "bag_id"]
    rows = [[path, bag_ids[bag]] for path, bag in zip(paths, bag_of.tolist(), strict=True)]
    if groups is not None:
        header.append("patient_id")
        opaque: dict[str, str] = {}
        for row, index in zip(rows, np.concatenate(plan.bags).tolist(), strict=True):
            row.append(opaque.setdefault(groups[index], f"p{len(opaque) + 1:04d}"))
    write_csv(folder / MANIFEST_FILE, header, rows)
    counts = []
    for bag_id, bag in zip(bag_ids, plan.bags, strict=True):
        counted = np.bincount(source.labels[bag], minlength=len(leaves))
        counts += [(bag_id, leaves[leaf], counted[leaf]) for leaf in np.flatnonzero(counted)]
    write_csv(folder / BAGS_FILE, ("bag_id", "label", "count"), counts)
    if len(plan.test):
        test = rng.permutation(plan.test)
        test_paths = _write_images(folder, "test", source, test, rng, step)
        labels = [leaves[label] for label in source.labels[test].tolist()]
        write_csv(folder / TEST_FILE, ("path", "label"), list(zip(test_paths, labels, strict=True)))


def _write_images(
    folder: Path,
    name: str,
    source: SourceTable,
    indices: Indices,
    rng: np.random.Generator,
    step: Callable[[], None],
) -> list[str]:
    """Write images as ``name/000001.png`` and so on in random order; return their relative paths."""
    (folder / name).mkdir()
    paths = [""] * len(indices)
    for number, position in enumerate(rng.permutation(len(indices)).tolist(), start=1):
        suffix = source.images.write(int(indices[position]), folder / name / f"{number:06d}")
        paths[position] = f"{name}/{number:06d}{suffix}"
        step()
    return paths
