"""Read image files whose labels stand in a table, or in the names of the folders that they lie in.

Tables are ISIC metadata, HAM10000, or any labelled CSV. Class folders are nested,
``ROOT/coarse/fine/image.png``, as deep as there are levels; where the folders directly below ROOT are called
train, val and test, they are the split.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.data.tables import CsvTable, read_csv, refuse_duplicate_names, unknown_label, usual_spellings
from common.errors import BadRow, DataError, UserError
from common.hierarchy import Hierarchy
from deploy.datasets.files import (
    IMAGE_SUFFIXES,
    TEST_WORDS,
    TRAIN_WORDS,
    Ending,
    FileImages,
    FileIndex,
    SourceImages,
    SourceTable,
    find_images,
)
from deploy.datasets.options import SourceOptions

_IMAGE_COLUMNS = (
    "image", "isic_id", "image_id", "image_name", "img_id", "filename", "file_name", "file", "path"
)  # fmt: skip
_LEVEL_COLUMN = re.compile(r"(?:diagnosis|level)_(\d+)", re.IGNORECASE)
_SPLIT_WORDS = TEST_WORDS | TRAIN_WORDS

_HAM10000_COLUMN, _HAM10000_GROUP = "dx", "lesion_id"
_HAM10000_LEVELS = ("lineage", "group", "dx")
_HAM10000_TREE = (
    ("melanocytic", "melanocytic", "nv"),
    ("melanocytic", "melanocytic", "mel"),
    ("non-melanocytic", "keratinocytic", "akiec"),
    ("non-melanocytic", "keratinocytic", "bcc"),
    ("non-melanocytic", "keratinocytic", "bkl"),
    ("non-melanocytic", "mesenchymal", "df"),
    ("non-melanocytic", "mesenchymal", "vasc"),
)


def table_source(
    options: SourceOptions,
    reader: Callable[[Sequence[Path]], SourceImages] = FileImages,
    is_image: Ending = IMAGE_SUFFIXES.__contains__,
) -> SourceTable:
    """Read a label table and find the images that it lists.

    The image column is the first of ``_IMAGE_COLUMNS`` that the table has; a name may lack its suffix and
    the file may lie in any folder below ``images``. Leaves come from ``label_column``, else from the
    last of ``diagnosis_1, diagnosis_2, ...``, else from HAM10000's ``dx``, whose tree is built in and
    whose ``lesion_id`` becomes the group.

    Args:
        options: with images and labels.
        reader: what reads the files found.
        is_image: tells of an ending whether images have it; see ``find_images``.

    Returns:
        The table; all other columns are kept for grouping. Rows with an unknown label, a missing
        image, or a path to the root that is not the tree's are its ``bad`` rows.

    Raises:
        DataError: the CSV or the tree cannot be read.
        UserError: no image or label column can be found.
    """
    assert options.images is not None
    assert options.labels is not None
    images, labels, label_column = Path(options.images), Path(options.labels), options.label_column
    hierarchy = None if options.hierarchy is None else Path(options.hierarchy)
    fatal: list[BadRow] = []
    bad: list[BadRow] = []
    table = read_csv(labels, (), fatal, bad)
    if table is None:
        raise DataError(f"the label table cannot be read: {labels}", fatal)
    image = image_column(table)
    levels = _level_columns(table, label_column)
    depth = options.depth
    if depth is not None and (label_column is not None or not 1 <= depth <= len(levels)):
        raise UserError(f"--levels {depth}: {labels} has {len(levels)} diagnosis column(s) to take from")
    levels = levels[:depth]
    group = None
    tree = Hierarchy.from_csv(hierarchy) if hierarchy is not None else None
    if not levels and label_column is None and _HAM10000_COLUMN in table.columns:
        levels = [_HAM10000_COLUMN]
        tree = tree or Hierarchy.from_rows(_HAM10000_LEVELS, _HAM10000_TREE)
        group = _HAM10000_GROUP if _HAM10000_GROUP in table.columns else None
    if not levels:
        raise UserError(
            f"{labels} has no diagnosis_1, diagnosis_2, ... columns; name the column of leaf labels with "
            f"--label-column. Its columns are: {', '.join(table.columns)}"
        )
    if tree is None and label_column is not None:
        raise UserError("--label-column needs --hierarchy: one row per leaf, coarse to fine")
    notes: list[str] = []
    usual = _usual_spellings(table, levels, tree)
    table = _joined(table, usual, notes) if options.fold_case else _only_usual(table, usual, bad)
    tree = tree or _tree_from(table, levels, bad)
    refuse_duplicate_names(tree, (hierarchy or labels).name)
    index = FileIndex(images, is_image)
    kept: list[int] = []
    paths: list[Path] = []
    leaves: list[int] = []
    first: dict[Path, int] = {}
    for number, (line, row) in enumerate(table):
        path, reason = index.find(row[image])
        reason = reason or _label_fault(row, levels, tree)
        # An image listed twice would be in two bags or count twice in one.
        if not reason and path in first:
            reason = f"image {row[image]!r} stands already in row {first[path]}"
        if reason:
            bad.append(BadRow(table.file, line, reason))
            continue
        first[path] = line
        kept.append(number)
        paths.append(path)
        leaves.append(tree.leaf_index[row[levels[-1]]])
    if index.twins:
        notes.append(
            f"{len(index.twins)} image(s) lie in several folders with the same bytes; each was taken once."
        )
    others = [name for name in table.columns if name != image]
    return SourceTable(
        file=table.file,
        images=reader(paths),
        labels=np.array(leaves, dtype=np.int64),
        hierarchy=tree,
        lines=[table.lines[number] for number in kept],
        columns={name: [table.rows[number][name] for number in kept] for name in others},
        group_column=group,
        bad=tuple(dict.fromkeys(bad)),
        notes=tuple(notes),
    )


def image_column(table: CsvTable) -> str:
    """Return the first of ``_IMAGE_COLUMNS`` that the table has.

    Raises:
        UserError: it has none; the text lists its columns.
    """
    name = table.column(_IMAGE_COLUMNS)
    if name is not None:
        return name
    raise UserError(
        f"{table.file} has no image column; call it one of {', '.join(_IMAGE_COLUMNS)}. "
        f"Its columns are: {', '.join(table.columns)}"
    )


def _level_columns(table: CsvTable, label_column: str | None) -> list[str]:
    """Return the columns with labels, coarse to fine, of which the last holds the leaf."""
    if label_column is not None:
        if label_column not in table.columns:
            known = ", ".join(table.columns)
            raise UserError(f"{table.file} has no column {label_column!r}; its columns are: {known}")
        return [label_column]
    found = [(int(match[1]), name) for name in table.columns if (match := _LEVEL_COLUMN.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _usual_spellings(
    table: CsvTable, levels: Sequence[str], tree: Hierarchy | None
) -> dict[str, dict[str, str]]:
    """Return, by column of labels, how each label in it is usually written."""
    usual = {}
    for level, name in enumerate(levels):
        known: tuple[str, ...] = ()
        if tree is not None and len(levels) == len(tree.levels):
            known = tree.classes[level]
        elif tree is not None and name == levels[-1]:
            known = tree.classes[-1]
        usual[name] = usual_spellings([row[name] for row in table.rows], known)
    return usual


def _joined(table: CsvTable, usual: Mapping[str, Mapping[str, str]], notes: list[str]) -> CsvTable:
    """Return the table with each class written in its usual way, and note what was changed."""
    changed = [row[name] for row in table.rows for name, own in usual.items() if own[row[name]] != row[name]]
    if changed:
        names = ", ".join(f"{name!r} ({number})" for name, number in Counter(changed).most_common(5))
        notes.append(f"{len(changed)} label(s) were joined with others: {names}.")
    rows = tuple({**row, **{name: own[row[name]] for name, own in usual.items()}} for row in table.rows)
    return replace(table, rows=rows)


def _only_usual(table: CsvTable, usual: Mapping[str, Mapping[str, str]], bad: list[BadRow]) -> CsvTable:
    """Return the rows whose labels are written as usual; the others become bad rows."""
    kept = []
    for line, row in table:
        for name, own in usual.items():
            if (spelling := own[row[name]]) != row[name]:
                hint = f"is written {spelling!r} elsewhere; did you mean it? (--fold-case)"
                bad.append(BadRow(table.file, line, f"{name} {row[name]!r} {hint}"))
                break
        else:
            kept.append((line, row))
    return replace(table, rows=tuple(row for _, row in kept), lines=tuple(line for line, _ in kept))


def _tree_from(table: CsvTable, levels: Sequence[str], bad: list[BadRow]) -> Hierarchy:
    """Return the tree that the rows span, sorted by name, with rows that fit no tree as bad rows."""
    parent: dict[tuple[int, str], tuple[str, int]] = {}
    paths = set()
    for line, row in table:
        cells = tuple(row[name] for name in levels)
        reason = ""
        for level, cell in enumerate(cells):
            if not cell:
                above = f", or take the levels above it with --levels {level}" if level else ""
                reason = f"{levels[level]} is empty; fill in every level{above}"
                break
            above, seen = parent.get((level, cell), (cells[level - 1], line))
            if level and above != cells[level - 1]:
                reason = f"{levels[level]} {cell!r} has another parent than in row {seen}"
                break
        if reason:
            bad.append(BadRow(table.file, line, reason))
            continue
        for level, cell in enumerate(cells):
            parent.setdefault((level, cell), (cells[level - 1], line))
        paths.add(cells)
    if not paths:
        raise DataError(f"{table.file} holds no usable row", bad)
    return Hierarchy.from_rows(list(levels), sorted(paths), file=table.file)


def _label_fault(row: dict[str, str], levels: Sequence[str], tree: Hierarchy) -> str:
    leaf = tree.leaf_index.get(row[levels[-1]])
    if leaf is None:
        return unknown_label(row[levels[-1]], tree)
    if len(levels) != len(tree.levels):
        return ""
    path = [tree.classes[level][node] for level, node in enumerate(tree.paths[leaf].tolist())]
    cells = [row[name] for name in levels]
    return "" if cells == path else f"labels {cells} are no path of the hierarchy; it has {path}"


def folder_source(root: Path, *, fold_case: bool = False) -> SourceTable:
    """Read nested class folders.

    With ``fold_case`` folders whose names differ only by case or blanks are one class.

    A class is called by its folder, or by ``parent/folder`` on levels where two folders share a name.
    Images at another depth than most, or outside the folders of a split, are bad rows.

    Raises:
        UserError: the folder is missing, holds no image in a class folder, or holds a folder that may be a
            split or a class.
    """
    found = find_images(root)
    files = found.images
    folders = [path.relative_to(root).parent.parts for path in files]
    if len({parts[:1] for parts in folders}) == 1 and {p[1].lower() for p in folders if p[1:]} & _SPLIT_WORDS:
        # An archive that unpacks into a folder of its own: the split is one level down.
        return folder_source(root / folders[0][0], fold_case=fold_case)
    has_split = _is_split({parts[0] for parts in folders if parts}, root)
    classes = [parts[1:] if has_split else parts for parts in folders]
    if fold_case:
        spelling = usual_spellings([name for parts in classes for name in parts])
        classes = [tuple(spelling[name] for name in parts) for parts in classes]
    inside = [not has_split or parts[:1] == () or parts[0].lower() in _SPLIT_WORDS for parts in folders]
    depth = Counter(len(parts) for parts, counts in zip(classes, inside, strict=True) if parts and counts)
    if not depth:
        raise UserError(f"{root} holds no image in a class folder")
    levels = depth.most_common(1)[0][0]
    bad = []
    kept = []
    for index, parts in enumerate(classes):
        if inside[index] and len(parts) == levels:
            kept.append(index)
            continue
        deep = f"lies {len(parts)} class folder(s) deep, most images lie {levels} deep"
        reason = deep if inside[index] else "lies neither in a train, val nor test folder"
        bad.append(BadRow(str(files[index].relative_to(root)), None, reason))
    named = _unique_names([classes[index] for index in kept], levels)
    tree = Hierarchy.from_rows([f"level_{level}" for level in range(1, levels + 1)], sorted(set(named)))
    return SourceTable(
        file=root.name,
        images=FileImages([files[index] for index in kept]),
        labels=np.array([tree.leaf_index[names[-1]] for names in named], dtype=np.int64),
        hierarchy=tree,
        lines=[None] * len(kept),
        columns={"split": [folders[index][0] for index in kept]} if has_split else {},
        split_column="split" if has_split else None,
        bad=tuple(bad),
        notes=found.notes(),
    )


def _is_split(top: Set[str], root: Path) -> bool:
    """Return whether the folders on top are train, val and test, and not classes."""
    words = {name.lower() for name in top} & _SPLIT_WORDS
    others = sorted(name for name in top if name.lower() not in _SPLIT_WORDS)
    # A class may be called "test". A wrong guess would train on test images, so the user is asked.
    if words and others and not (words & TEST_WORDS and words & TRAIN_WORDS):
        raise UserError(
            f"{root} holds {', '.join(sorted(words))} beside {', '.join(others[:5])}: is it a split or a "
            "class? Give train and test folders, or rename the class."
        )
    return bool(words)


def _unique_names(classes: list[tuple[str, ...]], levels: int) -> list[tuple[str, ...]]:
    """Return the class names of every path.

    A class is called by its folder, or by its path from the top where two folders of a level share a name.
    """
    names: list[list[str]] = [[] for _ in classes]
    for level in range(levels):
        prefixes = {parts[: level + 1] for parts in classes}
        twins = len({prefix[-1] for prefix in prefixes}) < len(prefixes)
        for name, parts in zip(names, classes, strict=True):
            name.append("/".join(parts[: level + 1]) if twins else parts[level])
    return [tuple(name) for name in names]
