"""Name a source of images, its synthetic stand-in, and how images are divided into sites and bags.

These are the settings of a build of site folders, as the command line, a comparison and Python programs give
them. Nothing heavy is loaded here: ``fedbags bags build --help`` lists the kinds of source.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PathLike = str | Path

_USUAL_SITES = 5


class SourceKind(StrEnum):
    """Name the layouts in which a folder of images can come."""

    SYNTHETIC = "synthetic"
    TABLE = "table"
    FOLDERS = "folders"
    MEDMNIST = "medmnist"
    CUB = "cub"
    AIRCRAFT = "aircraft"
    CARS = "cars"
    DICOM = "dicom"
    ARCHIVE = "archive"
    COUNTS = "counts"
    """Bags with counts and no labels; ``deploy.datasets.counts`` reads it, ``open_source`` does not."""


@dataclass(frozen=True)
class SourceOptions:
    """Say where labelled images are, and how their labels are to be read.

    Attributes:
        kind: the layout, one of SourceKind or its name.
        images: folder of images (table, dicom), root folder (folders, cub, aircraft, cars) or .npz file
            (medmnist, archive).
        labels: label table (table, dicom).
        hierarchy: label tree as CSV, one row per leaf (table, dicom, medmnist). Without it the diagnosis
            columns of the table are the tree.
        label_column: column of leaf names (table, dicom); needs ``hierarchy``.
        depth: take the first so many diagnosis columns; all if None (table, dicom).
        fold_case: join classes that differ only by case, blanks or the form of a letter (table, dicom,
            folders); else those that are not written as most are, are bad rows.
    """

    kind: SourceKind | str
    images: PathLike | None = None
    labels: PathLike | None = None
    hierarchy: PathLike | None = None
    label_column: str | None = None
    depth: int | None = None
    fold_case: bool = False


@dataclass(frozen=True)
class Division:
    """Say how labelled images are divided into sites, and those of a site into bags.

    Attributes:
        bag_size: images per bag; see ``deploy.datasets.partition.fill_bags`` for bags with groups.
        minimum_bag_size: images; no smaller bag is made, and the site's policy will refuse them.
        sites: number of sites (5 if None); with ``column:NAME`` the column's values decide.
        partition: ``iid``, ``dirichlet:ALPHA`` (per leaf class) or ``column:NAME``.
        bags: ``random``, ``column:NAME`` (a bag holds one value) or ``similarity``.
        group_column: patient or lesion ids: a group is never divided over sites, except where a column
            partition or the split does so, which the report notes. The source's own if None.
        groups: ``bags``: a group is not divided over bags either; ``sites``: bags are filled image by image,
            whatever the groups.
        missing_groups: ``refuse``: images without a cell in the group column are bad rows; ``alone``: each is
            a group of its own, which the report notes.
        split_column: rows that it calls test become test.csv. The source's own if None.
        seed: fixes the result.
    """

    bag_size: int = 16
    minimum_bag_size: int = 4
    sites: int | None = None
    partition: str = "iid"
    bags: str = "random"
    group_column: str | None = None
    groups: str = "bags"
    missing_groups: str = "refuse"
    split_column: str | None = None
    seed: int = 0

    @property
    def number_of_sites(self) -> int:
        """Return the number of sites where no column decides."""
        return _USUAL_SITES if self.sites is None else self.sites


@dataclass(frozen=True)
class SyntheticHospitals:
    """Describe hospitals of drawn lesions, with sessions of unlike class mixes.

    Attributes:
        sites: number of hospitals.
        seed: fixes everything.
        images_per_site: training images of each hospital.
        image_size: side of the images, pixels.
        test_images_per_site: test images of each hospital.
        session_size: images per session, of which a bag is made; a hospital's last may be smaller.
    """

    sites: int = _USUAL_SITES
    seed: int = 0
    images_per_site: int = 1200
    image_size: int = 48
    test_images_per_site: int = 240
    session_size: int = 16

    @property
    def division(self) -> Division:
        """Return how they are meant to be divided: a site per hospital, a bag per session."""
        return Division(
            bag_size=self.session_size, partition="column:hospital", bags="column:session", seed=self.seed
        )
