"""Check that sites with counts only train the same model, bit for bit, as sites with labelled tables.

    fedbags bags build --source archive --images pbc.npz --sites 5 --partition dirichlet:0.5 --out SITES
    python benchmarks/counts_only.py SITES --out WORK --rounds 12 --json

Every site folder of SITES, which was built from labels, is taken apart to what a hospital without labels has,
a folder of images per bag and a table of counts. Sites are built of these as `fedbags bags build --source
counts` does, without test.csv, and both forms are trained. The model of the counts is then tested on the test
images of SITES, which no site of the counts has.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.data.tables import read_listing
from client.evaluation import read_predictions
from client.site import SiteConfig, site_folders
from common.files import write_csv
from common.model.model_file import load_model
from deploy.configuration import RunRequest
from deploy.datasets.counts import CountedFiles, build_counted_site, read_counted_bags
from deploy.simulation.simulate import simulate


def take_apart(site: Path, folder: Path) -> None:
    """Write the folder that a hospital without labels has.

    It holds ``bags/BAG/*``, ``counts.csv`` (one column per class) and ``hierarchy.csv``. Images are numbered
    in the order of the manifest, so that a site built of them keeps it.
    """
    tree, listing = read_listing(site, SiteConfig.load(site))
    for number, row in enumerate(listing.images):
        target = folder / "bags" / row.key / f"{number:06d}{Path(row.path).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site / row.path, target)
    rows = [[bag, *counts.tolist()] for bag, counts in zip(listing.bag_ids, listing.counts, strict=True)]
    write_csv(folder / "counts.csv", ("bag", *tree.classes[-1]), rows)
    tree.to_csv(folder / "hierarchy.csv")


def build_from_counts(labelled: Sequence[Path], work: Path) -> Path:
    """Take the sites apart, build them again from counts, and return the folder of the new sites."""
    out = work / "sites"
    for site in labelled:
        hospital = work / "hospitals" / site.name
        take_apart(site, hospital)
        policy = SiteConfig.load(site).policy
        files = CountedFiles(hospital / "bags", hospital / "counts.csv", hospital / "hierarchy.csv")
        bags = read_counted_bags(files, minimum_bag_size=policy.minimum_bag_size)
        build_counted_site(bags, out, site.name)
    return out


def same_bags(first: Path, second: Path, image_size: int) -> bool:
    """Return whether two site folders hold the same bag ids, counts and decoded pixels in the same order."""
    one, other = BagStore.open(first, image_size), BagStore.open(second, image_size)
    return (
        one.bag_ids == other.bag_ids
        and np.array_equal(one.leaf_counts, other.leaf_counts)
        and all(np.array_equal(one[bag].images, other[bag].images) for bag in range(len(one)))
    )


def accuracy(run: Path, sites: Sequence[Path]) -> dict[str, float]:
    """Return the accuracy of a run's model at every level on the pooled test images of some sites.

    The prediction is the best root-to-leaf path.
    """
    model, card = load_model(run)
    right: list[torch.Tensor] = []
    for site in sites:
        test = LabelledImages.open(site, card.preprocessing.image_size)
        if test is not None:
            predicted = read_predictions(model, test, torch.device("cpu"))["path"]
            right.append(predicted == torch.from_numpy(test.hierarchy.paths[test.labels]))
    if not right:
        return {}
    shares = torch.cat(right).double().mean(dim=0).tolist()
    return dict(zip(model.hierarchy.levels, shares, strict=True))


def compare(
    sites_dir: Path, work: Path, settings: Sequence[str], workers: int | None = None
) -> dict[str, Any]:
    """Train on both forms of the sites and return what is the same.

    Args:
        sites_dir: site folders that were built from labels.
        work: a folder to make.
        settings: ``KEY=VALUE`` texts for both runs.
        workers: processes; as many as cores if None.
    """
    labelled = site_folders(sites_dir)
    counted = build_from_counts(labelled, work)
    runs = {"labels": (sites_dir, work / "run-labels"), "counts": (counted, work / "run-counts")}
    for sites, run in runs.values():
        request = RunRequest({"sites-dir": str(sites.resolve())}, settings, out=run)
        simulate(request, workers=workers, figures=False, quiet=True)
    models = [(run / "model.safetensors").read_bytes() for _, run in runs.values()]
    size = load_model(work / "run-counts")[1].preprocessing.image_size
    return {
        "sites": len(labelled),
        "same_bags": all(same_bags(site, counted / site.name, size) for site in labelled),
        "same_model": models[0] == models[1],
        "test_tables_of_counts": len(list(counted.rglob("test.csv"))),
        "accuracy": {form: accuracy(run, labelled) for form, (_, run) in runs.items()},
    }


def main() -> None:
    """Compare both forms of the given sites and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sites", type=Path, help="site folders that were built from labels")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, with both runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = compare(given.sites, given.out, [f"rounds={given.rounds}", *given.set])
    print(json.dumps(result, indent=2) if given.json else result)


if __name__ == "__main__":
    main()
