"""Read images in nested class folders, ``ROOT/coarse/fine/image.png``.

The depth is the number of levels. Where the folders directly below ROOT are called train, val and test, they
are the split.
"""

from collections import Counter
from collections.abc import Set
from pathlib import Path

import numpy as np

from client.label_names import usual_spellings
from client.sources.file_index import find_images
from client.sources.source_table import TEST_WORDS, TRAIN_WORDS, FileImages, SourceTable
from common.errors import BadRow, UserError
from common.hierarchy import Hierarchy

SPLIT_WORDS = TEST_WORDS | TRAIN_WORDS


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
    if len({parts[:1] for parts in folders}) == 1 and {p[1].lower() for p in folders if p[1:]} & SPLIT_WORDS:
        # An archive that unpacks into a folder of its own: the split is one level down.
        return folder_source(root / folders[0][0], fold_case=fold_case)
    has_split = _is_split({parts[0] for parts in folders if parts}, root)
    classes = [parts[1:] if has_split else parts for parts in folders]
    if fold_case:
        spelling = usual_spellings([name for parts in classes for name in parts])
        classes = [tuple(spelling[name] for name in parts) for parts in classes]
    inside = [not has_split or parts[:1] == () or parts[0].lower() in SPLIT_WORDS for parts in folders]
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
    words = {name.lower() for name in top} & SPLIT_WORDS
    others = sorted(name for name in top if name.lower() not in SPLIT_WORDS)
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
