"""Read archives of arrays, one .npz with images and labels, after checking the size that they declare.

A few kilobytes can declare terabytes, in the zip's directory or in an array's shape, so headers are read
before anything is unpacked. MedMNIST's archives have train, val and test arrays. Hierarchical ones have
labels at every level, class names and the tree, in two layouts, for levels 1..L, coarse to fine::

    x, y1..yL, is_test                                one array of images, and which of them are for tests
    x_train, y1_train..yL_train, x_test, y1_test..    two arrays of images

and in both ``names1..namesL`` (class names), ``tree_LtoL-1`` .. ``tree_2to1`` (the parent of each class),
and, where there are any, ``levels`` (names of the levels) and ``group`` or ``track`` (whole numbers: the
patient, or whatever else several images show; with ``_train`` and ``_test`` in the second layout).
"""

import math
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import BadRow, UserError, require_file
from common.hierarchy import Hierarchy
from deploy.datasets.files import ArrayImages, SourceTable

_MAX_MEMBERS = 1000
"""Files in one archive; data sets have a dozen."""
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, TypeError, OSError)
"""What a damaged archive makes its readers raise."""
_SPLIT_COLUMN, _GROUP_COLUMN = "split", "group"
_SPLITS = ("train", "test")
_GROUP_ARRAYS = ("group", "track")
_MEDMNIST_SPLITS = ("train", "val", "test")


def _check_arrays(packed: zipfile.ZipFile, room: int, names: Collection[str] | None = None) -> None:
    """Refuse an archive that would not fit, or whose arrays are not of the size that they declare.

    A file that is longer than the zip declares is cut off there by ``zipfile`` and fails its checksum, so
    what is declared is what can come.

    Args:
        packed: the open archive.
        room: bytes that there are to unpack to.
        names: the members that will be unpacked; all if None.

    Raises:
        ValueError: too many members, more bytes than there is room for, or an array's header that does not
            fit the bytes behind it. The text names members and sizes.
    """
    members = [info for info in packed.infolist() if names is None or info.filename in names]
    if len(members) > _MAX_MEMBERS:
        raise ValueError(f"{len(members)} members, more than the {_MAX_MEMBERS} that are read")
    needed = sum(info.file_size for info in members)
    if needed > room:
        raise ValueError(f"it takes {needed:,} bytes unpacked, and there is room for {room:,}")
    for info in members:
        if not info.filename.endswith(".npy"):
            continue
        with packed.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(
                    f"{info.filename} has the version {version} of the .npy format; save it anew"
                )
            first = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            # Reading Python objects means unpickling, which runs whatever code the file holds.
            if dtype.hasobject:
                raise ValueError(f"{info.filename} holds Python objects, which are not read")
            declared, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        # NumPy reserves what the shape declares before it reads, so the shape must not exceed the bytes.
        if declared != held:
            raise ValueError(f"{info.filename} declares {dtype} of shape {shape}, and holds {held:,} bytes")


def archive_source(archive: Path) -> SourceTable:
    """Read an archive of either layout, holding its images in memory.

    Args:
        archive: the .npz; images (N, H, W) or (N, H, W, 3) uint8, labels and parents whole numbers.

    Returns:
        The table with the columns ``split`` and, where the archive has ids, ``group``: an image of a part
        without ids is a group of its own. Images whose labels are no path of the tree are ``bad`` rows.

    Raises:
        UserError: no such file, no such archive, or an array that is missing or of another kind.
        DataError: names and parents are no tree.
    """
    require_file(archive, "the archive", "Give the .npz file of the data set.")
    try:
        # This says "File is not a zip file"; numpy would speak of pickles.
        with zipfile.ZipFile(archive) as listed:
            # Half of the memory, since all images are copied once when the parts are joined.
            _check_arrays(listed, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
        with np.load(archive, allow_pickle=False) as packed:
            arrays = _Arrays(archive, dict(packed))
    except _UNREADABLE as error:
        raise UserError(f"{archive} cannot be read as an archive of arrays: {error}") from error
    tree, paths = arrays.tree()
    in_one = arrays.has("x")
    parts = [arrays.part(suffix, paths.shape[1]) for suffix in ([""] if in_one else ["_train", "_test"])]
    if len({images.shape[1:] for images, _, _ in parts}) > 1:
        raise UserError(f"{archive}: x_train and x_test hold images of different sizes")
    images = np.concatenate([images for images, _, _ in parts])
    labels = np.concatenate([labels for _, labels, _ in parts])
    if in_one:
        is_test = arrays.get("is_test", np.bool_, (len(images),))
    else:
        is_test = np.repeat([False, True], [len(images) for images, _, _ in parts])
    inside = (labels[:, -1] >= 0) & (labels[:, -1] < len(paths))
    good = inside & (labels == paths[np.where(inside, labels[:, -1], 0)]).all(axis=1)
    kept = np.flatnonzero(good)
    columns: dict[str, Sequence[str]] = {_SPLIT_COLUMN: [_SPLITS[int(is_test[index])] for index in kept]}
    if any(groups is not None for _, _, groups in parts):
        ids = [
            name
            for number, (part, _, groups) in enumerate(parts)
            for name in groups or [f"image {number}.{index}" for index in range(len(part))]
        ]
        columns[_GROUP_COLUMN] = [ids[index] for index in kept.tolist()]
    return SourceTable(
        file=archive.name,
        images=ArrayImages(lambda index: images[kept[index]]),
        labels=labels[kept, -1],
        hierarchy=tree,
        lines=[None] * len(kept),
        columns=columns,
        split_column=_SPLIT_COLUMN,
        group_column=_GROUP_COLUMN if _GROUP_COLUMN in columns else None,
        bad=tuple(
            BadRow(archive.name, None, f"image {index}: {labels[index].tolist()} is no path of the tree")
            for index in np.flatnonzero(~good).tolist()
        ),
    )


class _Arrays:
    """Give access to the arrays of one file, checking the type and shape of each."""

    def __init__(self, file: Path, arrays: dict[str, NDArray[Any]]) -> None:
        self._file, self._arrays = file, arrays

    def has(self, name: str) -> bool:
        return name in self._arrays

    def get(self, name: str, kind: type[Any], shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return an array, if it is of this kind of type and, where one is given, of this shape.

        Raises:
            UserError: it is missing or another kind of array.
        """
        if name not in self._arrays:
            raise UserError(
                f"{self._file} holds no {name}; it has {', '.join(sorted(self._arrays)) or 'nothing'}.\n"
                "docs/data.md says which arrays a hierarchical archive has."
            )
        array = self._arrays[name]
        if not np.issubdtype(array.dtype, kind) or shape not in (None, array.shape):
            raise UserError(
                f"{self._file}: {name} is {array.dtype} of shape {array.shape}; needed is {kind.__name__}"
                + (f" of shape {shape}" if shape else "")
            )
        return array

    def tree(self) -> tuple[Hierarchy, NDArray[np.int64]]:
        """Return the tree, and the archive's class numbers of every leaf at every level, shape (C_L, L)."""
        depth = 1
        while self.has(f"names{depth + 1}"):
            depth += 1
        names = [self.get(f"names{level}", np.str_) for level in range(1, depth + 1)]
        columns = [np.arange(len(names[-1]))]
        for level in range(depth, 1, -1):
            name, above = f"tree_{level}to{level - 1}", len(names[level - 2])
            parents = self.get(name, np.integer, (len(names[level - 1]),))
            if parents.min() < 0 or parents.max() >= above:
                raise UserError(f"{self._file}: {name} names a parent outside 0..{above - 1}")
            columns.append(parents[columns[-1]].astype(np.int64))
        paths = np.stack(columns[::-1], axis=1)
        rows = [[str(names[level][node]) for level, node in enumerate(path)] for path in paths.tolist()]
        levels = [f"level_{level}" for level in range(1, depth + 1)]
        if self.has("levels"):
            levels = self.get("levels", np.str_, (depth,)).tolist()
        return Hierarchy.from_rows(levels, rows, file=self._file.name), paths

    def part(self, suffix: str, depth: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str] | None]:
        """Return images, labels of shape (N, L), and group names if there are any, of one part."""
        images = self.get(f"x{suffix}", np.uint8)
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise UserError(
                f"{self._file}: x{suffix} has shape {images.shape}; needed is (N, H, W) or (N, H, W, 3)"
            )
        number = (len(images),)
        labels = [self.get(f"y{level}{suffix}", np.integer, number) for level in range(1, depth + 1)]
        groups = None
        for name in _GROUP_ARRAYS:
            if self.has(f"{name}{suffix}"):
                ids = self.get(f"{name}{suffix}", np.integer, number)
                groups = [f"{name} {value}" for value in ids.tolist()]
        return images, np.stack(labels, axis=1).astype(np.int64), groups


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
        parts = _unpack_medmnist(archive, folder)
        labels = np.concatenate([part[1] for part in parts.values()])
        classes = int(labels.max()) + 1
        if hierarchy is None:
            tree = Hierarchy.from_rows(["class"], [[f"class-{number}"] for number in range(classes)])
        else:
            tree = Hierarchy.from_csv(hierarchy)
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


def _unpack_medmnist(archive: Path, folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return per split the images, mapped from disk, and the labels, shape (N,)."""
    parts = {}
    try:
        with zipfile.ZipFile(archive) as packed:
            names = set(packed.namelist())
            wanted = {f"{split}_{what}.npy" for split in _MEDMNIST_SPLITS for what in ("images", "labels")}
            _check_arrays(packed, shutil.disk_usage(folder).free, wanted)
            for split in _MEDMNIST_SPLITS:
                files = [f"{split}_{what}.npy" for what in ("images", "labels")]
                if names.isdisjoint(files):
                    continue
                # Unpacked first, because a compressed member cannot be mapped.
                mapped = [np.load(packed.extract(name, folder), mmap_mode="r") for name in files]
                parts[split] = _check_medmnist(archive, split, *mapped)
    except (*_UNREADABLE, KeyError) as error:
        raise UserError(f"{archive} cannot be read as a MedMNIST archive: {error}") from error
    if "train" not in parts:
        raise UserError(f"{archive} holds no train_images; it is not a MedMNIST archive")
    return parts


def _check_medmnist(
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
