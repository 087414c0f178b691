"""Read MedMNIST-style archives, one .npz with train, val and test arrays of images and labels."""

import shutil
import tempfile
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import BadRow, UserError, require_file
from common.hierarchy import Hierarchy
from deploy.datasets.archive import check_arrays
from deploy.datasets.files import ArrayImages, SourceTable

_SPLITS = ("train", "val", "test")


def medmnist_source(archive: Path, hierarchy: Path | None = None) -> SourceTable:
    """Read ``{train,val,test}_{images,labels}`` of an archive, with val counted as training.

    The arrays are unpacked to a temporary folder and mapped, since the larger archives do not fit into
    memory; the folder goes when the table does.

    Args:
        archive: the .npz; images (N, H, W) or (N, H, W, 3) uint8, labels (N,) or (N, 1).
        hierarchy: label tree whose i-th row is class i; without it one level, ``class-0`` and so on.

    Raises:
        UserError: no such file, an array of another shape, or several labels per image.
        DataError: the tree cannot be read.
    """
    require_file(archive, "the archive", "Give the .npz file of the data set.")
    folder = Path(tempfile.mkdtemp(prefix="fedbags-"))
    try:
        parts = _unpack(archive, folder)
        labels = np.concatenate([part[1] for part in parts.values()])
        tree = _tree(hierarchy, int(labels.max()) + 1)
        starts = np.cumsum([0, *(len(part[1]) for part in parts.values())])
        arrays = [part[0] for part in parts.values()]
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    splits = [split for split, part in parts.items() for _ in range(len(part[1]))]

    def get(index: int) -> NDArray[np.uint8]:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return np.array(arrays[part][index - starts[part]])

    known = labels < tree.sizes[-1]
    kept = np.flatnonzero(known)
    bad = [
        BadRow(archive.name, None, f"image {index}: class {labels[index]} has no row in the hierarchy")
        for index in np.flatnonzero(~known).tolist()
    ]
    table = SourceTable(
        file=archive.name,
        images=ArrayImages(lambda index: get(int(kept[index]))),
        labels=labels[kept],
        hierarchy=tree,
        lines=[None] * len(kept),
        columns={"split": [splits[index] for index in kept]},
        split_column="split",
        bad=tuple(bad),
    )
    # The images are read from the folder as long as the table is in use, so it goes with the table.
    weakref.finalize(table, shutil.rmtree, folder, ignore_errors=True)
    return table


def _unpack(archive: Path, folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return per split the images, mapped from disk, and the labels, shape (N,)."""
    parts = {}
    try:
        with zipfile.ZipFile(archive) as packed:
            names = set(packed.namelist())
            wanted = {f"{split}_{what}.npy" for split in _SPLITS for what in ("images", "labels")}
            check_arrays(packed, shutil.disk_usage(folder).free, wanted)
            for split in _SPLITS:
                files = [f"{split}_{what}.npy" for what in ("images", "labels")]
                if names.isdisjoint(files):
                    continue
                # Unpacked first, because a compressed member cannot be mapped.
                mapped = [np.load(packed.extract(name, folder), mmap_mode="r") for name in files]
                parts[split] = _check(archive, split, *mapped)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        KeyError,
        ValueError,
        OSError,
    ) as error:
        raise UserError(f"{archive} cannot be read as a MedMNIST archive: {error}") from error
    if "train" not in parts:
        raise UserError(f"{archive} holds no train_images; it is not a MedMNIST archive")
    return parts


def _check(
    archive: Path, split: str, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise UserError(
            f"{archive}: {split}_images is {images.dtype} of shape {shape}; needed is uint8 of shape "
            "(N, H, W) or (N, H, W, 3)"
        )
    if labels.size != len(images) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"{archive}: {split}_labels has shape {labels.shape}; needed is one class number per image"
        )
    return images, np.asarray(labels, dtype=np.int64).ravel()


def _tree(hierarchy: Path | None, classes: int) -> Hierarchy:
    if hierarchy is not None:
        return Hierarchy.from_csv(hierarchy)
    return Hierarchy.from_rows(["class"], [[f"class-{number}"] for number in range(classes)])
