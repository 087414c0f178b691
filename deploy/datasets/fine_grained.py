"""Read CUB-200-2011, FGVC-Aircraft and Stanford Cars in their official layouts, with their trees.

The trees are facts of the data sets, kept in the folder of this module. One class differs from what
publications use: they put CUB's class 84, a gull, into the gulls' family and the kingfishers' order, which is
no tree; here it has the order of its family.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BadRow, UserError, require_file
from common.hierarchy import Hierarchy
from deploy.datasets.files import FileImages, SourceTable, find_images

_HIERARCHIES = Path(__file__).with_name("hierarchies")


@dataclass(frozen=True)
class _Row:
    """Represent one image of a list, with its expected path, its class, its split and its line."""

    path: Path
    label: str
    split: str
    file: str
    line: int | None


def cub_source(root: Path) -> SourceTable:
    """Read CUB-200-2011 with the levels order, family and species.

    Its files are ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt`` and
    ``images/``.

    Raises:
        UserError: one of the lists is missing or not what it should be.
    """
    root = _unpacked(root, "images.txt")
    classes = {number: name.partition(".")[2] for _, number, name in _pairs(root / "classes.txt")}
    label_of = {image: number for _, image, number in _pairs(root / "image_class_labels.txt")}
    split_of = {
        image: "train" if flag == "1" else "test" for _, image, flag in _pairs(root / "train_test_split.txt")
    }
    rows = [
        _Row(
            root / "images" / name,
            classes.get(label_of.get(image, ""), ""),
            # An image that the split does not name gets no split: the build then refuses it.
            split_of.get(image, ""),
            "images.txt",
            line,
        )
        for line, image, name in _pairs(root / "images.txt")
    ]
    return _table("cub200.csv", root, rows)


def aircraft_source(root: Path) -> SourceTable:
    """Read FGVC-Aircraft with the levels manufacturer, family and variant.

    Its files are ``data/images_variant_{train,val,test}.txt`` (or ``trainval``) and ``data/images/``.

    Raises:
        UserError: one of the lists is missing or not what it should be.
    """
    root = _unpacked(root, "data", "images_variant_test.txt")
    data = root / "data" if (root / "data").is_dir() else root
    both = (data / "images_variant_trainval.txt").is_file()
    rows = [
        _Row(data / "images" / f"{image}.jpg", label, split, f"images_variant_{split}.txt", line)
        for split in (("trainval", "test") if both else ("train", "val", "test"))
        for line, image, label in _pairs(data / f"images_variant_{split}.txt")
    ]
    return _table("aircraft100.csv", root, rows)


def cars_source(root: Path) -> SourceTable:
    """Read Stanford Cars with the levels type and model.

    Its files are ``devkit/`` with .mat lists and ``cars_train/``, ``cars_test/``; or ``cars_annos.mat`` and
    ``car_ims/``; or class folders below ``train/`` and ``test/``.

    Raises:
        UserError: none of these layouts, or a list is missing.
    """
    root = _unpacked(root, "cars_annos.mat", "devkit", "train")
    devkit = root / "devkit"
    if (root / "cars_annos.mat").is_file():
        rows = list(_cars_in_one(root))
    elif devkit.is_dir():
        rows = list(_cars_devkit(root, devkit))
    elif (root / "train").is_dir() and (root / "test").is_dir():
        rows = list(_cars_folders(root))
    else:
        raise UserError(f"{root} has none of the layouts of Stanford Cars: devkit/, cars_annos.mat, train/")
    return _table("cars196.csv", root, rows)


def _unpacked(root: Path, *names: str) -> Path:
    """Return the folder that holds one of these names.

    It is ``root``, or the only such folder up to two levels below it: archives unpack into a folder of their
    own, some into two.
    """
    for pattern in ("", "*/", "*/*/"):
        found = sorted({path.parent for name in names for path in root.glob(pattern + name)})
        if len(found) == 1:
            return found[0]
    return root


def _cars_devkit(root: Path, devkit: Path) -> Iterator[_Row]:
    names = [str(name) for name in _mat(devkit / "cars_meta.mat")["class_names"]]
    labelled = next(iter(root.rglob("cars_test_annos_withlabels.mat")), devkit / "cars_test_annos.mat")
    for split, path in (("train", devkit / "cars_train_annos.mat"), ("test", labelled)):
        annotations = _mat(path)["annotations"]
        for line, note in enumerate(annotations, start=1):
            if not hasattr(note, "class"):
                raise UserError(f"{path} holds no classes; get cars_test_annos_withlabels.mat")
            label = _numbered(names, int(getattr(note, "class")))
            yield _Row(root / f"cars_{split}" / str(note.fname), label, split, path.name, line)


def _cars_in_one(root: Path) -> Iterator[_Row]:
    data = _mat(root / "cars_annos.mat")
    names = [str(name) for name in data["class_names"]]
    for line, note in enumerate(data["annotations"], start=1):
        label = _numbered(names, int(getattr(note, "class")))
        split = "test" if int(note.test) else "train"
        yield _Row(root / str(note.relative_im_path), label, split, "cars_annos.mat", line)


def _cars_folders(root: Path) -> Iterator[_Row]:
    """Read class folders whose names lack what a file name cannot hold, or have '_' for ' '."""
    tree = Hierarchy.from_csv(_HIERARCHIES / "cars196.csv")
    label_of = {_letters(name): name for name in tree.classes[-1]}
    for split in ("train", "test"):
        for path in find_images(root / split).images:
            folder = path.parent.name
            file = str(path.relative_to(root))
            yield _Row(path, label_of.get(_letters(folder), folder), split, file, None)


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _numbered(names: list[str], number: int) -> str:
    return names[number - 1] if 1 <= number <= len(names) else f"class {number}"


def _mat(path: Path) -> dict[str, Any]:
    """Read the variables of a MATLAB file, with structs as objects and one-element arrays unwrapped."""
    from scipy.io import loadmat

    require_file(path, "the list", "Give the folder into which the data set was unpacked.")
    try:
        data: dict[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # loadmat raises nearly anything on damaged files
        raise UserError(f"{path} cannot be read as a MATLAB file: {error}") from error
    for name in ("annotations", "class_names"):
        if name in data:
            # Unwrapping turns a list of one entry into that entry, which must be a list again.
            data[name] = np.atleast_1d(data[name])
    return data


def _pairs(path: Path) -> list[tuple[int, str, str]]:
    """Return the lines ``key rest of line`` of a list, with their numbers."""
    require_file(path, "the list", "Give the folder into which the data set was unpacked.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        key, _, rest = line.strip().partition(" ")
        if key:
            pairs.append((number, key, rest.strip()))
    return pairs


def _table(tree_file: str, root: Path, rows: Iterable[_Row]) -> SourceTable:
    tree = Hierarchy.from_csv(_HIERARCHIES / tree_file)
    kept: list[_Row] = []
    bad: list[BadRow] = []
    for row in rows:
        reason = ""
        if row.label not in tree.leaf_index:
            reason = f"unknown label {row.label!r}; it is no leaf of the official tree"
        # A list comes from the internet: it must not name files outside of its data set.
        elif ".." in row.path.parts:
            reason = f"{row.path.name!r} leads out of the folder"
        elif not row.path.is_file():
            reason = f"{row.path.relative_to(root)}: no such image"
        if reason:
            bad.append(BadRow(row.file, row.line, reason))
        else:
            kept.append(row)
    return SourceTable(
        file=kept[0].file if kept else root.name,
        images=FileImages([row.path for row in kept]),
        labels=np.array([tree.leaf_index[row.label] for row in kept], dtype=np.int64),
        hierarchy=tree,
        lines=[row.line for row in kept],
        columns={"split": [row.split for row in kept]},
        split_column="split",
        bad=tuple(bad),
    )
