"""Open a source of images by its name, and refuse paths and options that it does not read."""

from enum import StrEnum
from pathlib import Path

from common.errors import UserError
from deploy.lazy import lazy_imports

# Each source runs only when it is used: the command line loads this module to show its help, and some sources
# need slow or optional packages.
with lazy_imports():
    from deploy.datasets import archive, dicom, files, fine_grained, medmnist, synthetic, table


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


def open_source(
    kind: SourceKind | str,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    hierarchy: Path | None = None,
    label_column: str | None = None,
    sites: int = 5,
    seed: int = 0,
    images_per_site: int = 1200,
    image_size: int = 48,
    bag_size: int = 16,
    depth: int | None = None,
    fold_case: bool = False,
) -> "files.SourceTable":
    """Open a source of labelled images as one table.

    Args:
        kind: one of SourceKind but COUNTS, which has no label to make a table of.
        images: folder of images (table, dicom), root folder (folders, cub, aircraft, cars) or .npz file
            (medmnist, archive).
        labels: label table (table, dicom).
        hierarchy: label tree as CSV (table, dicom, medmnist).
        label_column: column of leaf names (table, dicom).
        sites: number of hospitals; this and the next four are for synthetic only, see synthetic_source.
        seed: fixes the drawn images.
        images_per_site: training images of each hospital.
        image_size: side of the images, pixels.
        bag_size: images per session.
        depth: take the first so many diagnosis columns (table, dicom).
        fold_case: join classes that differ only by case or blanks (table, dicom, folders).

    Raises:
        UserError: an unknown kind, a path that is missing or that this source would ignore; and what the
            source itself raises.
    """
    try:
        kind = SourceKind(kind)
    except ValueError:
        raise UserError(f"unknown source {kind!r}; known are: {', '.join(SourceKind)}") from None
    if kind is SourceKind.COUNTS:
        raise UserError("--source counts has no labels: `fedbags bags build` reads it by itself")
    from_table = kind in (SourceKind.TABLE, SourceKind.DICOM)
    given = {
        "--labels": labels,
        "--label-column": label_column,
        "--hierarchy": hierarchy,
        "--levels": depth,
        "--fold-case": fold_case or None,
    }
    others = {SourceKind.MEDMNIST: {"--hierarchy"}, SourceKind.FOLDERS: {"--fold-case"}}
    takes = set(given) if from_table else others.get(kind, set())
    # An option that is ignored would leave the user with another data set than asked for.
    if ignored := [name for name, value in given.items() if value is not None and name not in takes]:
        raise UserError(f"--source {kind} does not read {', '.join(ignored)}")
    if kind is SourceKind.SYNTHETIC:
        if images is not None:
            raise UserError("--source synthetic draws its images; it does not read --images")
        tests = images_per_site // 5
        return synthetic.synthetic_source(sites, seed, images_per_site, image_size, tests, bag_size)
    if images is None or (from_table and labels is None):
        raise UserError(f"--source {kind} needs --images" + (" and --labels" if from_table else ""))
    return _open(kind, images, labels, hierarchy, label_column, depth, fold_case)


def _open(
    kind: SourceKind,
    images: Path,
    labels: Path | None,
    hierarchy: Path | None,
    label_column: str | None,
    depth: int | None,
    fold_case: bool,
) -> "files.SourceTable":
    if kind is SourceKind.FOLDERS:
        return table.folder_source(images, fold_case=fold_case)
    if kind is SourceKind.MEDMNIST:
        return medmnist.medmnist_source(images, hierarchy)
    if kind is SourceKind.ARCHIVE:
        return archive.archive_source(images)
    if kind in (SourceKind.CUB, SourceKind.AIRCRAFT, SourceKind.CARS):
        readers = {
            SourceKind.CUB: fine_grained.cub_source,
            SourceKind.AIRCRAFT: fine_grained.aircraft_source,
            SourceKind.CARS: fine_grained.cars_source,
        }
        return readers[kind](images)
    assert labels is not None
    if kind is SourceKind.DICOM:
        return dicom.dicom_source(images, labels, hierarchy, label_column, depth=depth, fold_case=fold_case)

    return table.table_source(images, labels, hierarchy, label_column, depth=depth, fold_case=fold_case)
