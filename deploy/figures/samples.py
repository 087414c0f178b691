"""Read the labelled test images that t-SNE and activation maps are drawn from.

They are at hand only in a simulation. In a deployment they are at the hospitals, and these figures are left
out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.labelled import LabelledImages
from client.site import SiteConfig, site_folders
from common.errors import UserError
from deploy.datasets.build import kept_synthetic_sites
from deploy.datasets.synthetic import lesion_hierarchy
from deploy.figures.finished_run import FinishedRun


class NoTestImages(Exception):  # noqa: N818  (a finding, not a fault: the picture is left out)
    """Signal that a figure has no data to draw, with a text that gives the reason in one line."""


@dataclass(frozen=True)
class TestSample:
    """Hold some test images of a run's sites, pooled in the order of the sites.

    Attributes:
        images: shape (N, S, S, 3) uint8.
        labels: shape (N,) leaf indices.
        sites: shape (N,) index of the site that each image is from.
    """

    # pytest would take a class of this name for tests.
    __test__ = False

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sites: NDArray[np.int64]


def find_sites(run: FinishedRun) -> list[Path]:
    """Return the folders of the sites that the run was made with.

    Raises:
        NoTestImages: they are not in reach.
    """
    if run.config.sites_dir:
        try:
            folders = site_folders(Path(run.config.sites_dir))
        except UserError as error:
            raise NoTestImages(f"the sites have moved: {_first_line(error)}") from error
    elif run.tree == lesion_hierarchy():
        # Without sites-dir a run is a deployment, or one of release 0.1 on synthetic hospitals, which have
        # this tree. They are drawn from the run's seed, so drawing them again gives the same images.
        folders = kept_synthetic_sites(run.config)
    else:
        raise NoTestImages("the run was made at real sites, whose images are not here")
    took_part = run.summary.per_site
    try:
        present = [folder for folder in folders if SiteConfig.load(folder).name in took_part]
    except UserError as error:
        raise NoTestImages(_first_line(error)) from error
    if not present:
        raise NoTestImages("none of the sites found is one of the run's")
    return present


def read_sample(run: FinishedRun, folders: list[Path], image_size: int, most: int) -> TestSample:
    """Draw up to ``most`` test images by chance, fixed by the run's seed.

    The same run, folders and number give the same images at every ``image_size``.

    Args:
        run: the run, whose label tree the images must have.
        folders: the site folders.
        image_size: side of the images in pixels.
        most: the largest number of images.

    Returns:
        The images with their labels and sites.

    Raises:
        NoTestImages: the sites have no test images that can be read, or another label tree.
    """
    opened: list[tuple[int, LabelledImages]] = []
    for number, folder in enumerate(folders):
        try:
            found = LabelledImages.open(folder, image_size, skip_bad=run.config.skip_bad)
        except UserError as error:
            raise NoTestImages(_first_line(error)) from error
        if found is None:
            continue
        if found.hierarchy != run.tree:
            raise NoTestImages(f"the label tree of {folder} is not the run's")
        opened.append((number, found))
    if not opened:
        raise NoTestImages("the sites have no labelled test images (test.csv)")
    sizes = [len(found.labels) for _, found in opened]
    total = sum(sizes)
    chosen = np.arange(total)
    if total > most:
        # Chosen by number alone, so that every image size gets the same images.
        chosen = np.sort(np.random.default_rng(run.config.seed).permutation(total)[:most])
    images, labels, sites = [], [], []
    for start, size, (number, found) in zip(np.cumsum([0, *sizes]), sizes, opened, strict=False):
        rows = chosen[(chosen >= start) & (chosen < start + size)] - start
        images.append(found.images[rows])
        labels.append(found.labels[rows])
        sites.append(np.full(len(rows), number))
    return TestSample(np.concatenate(images), np.concatenate(labels), np.concatenate(sites))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
