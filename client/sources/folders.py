"""Images in nested class folders: ``ROOT/coarse/fine/image.png``. The depth is the number of levels.

Where the folders directly below ROOT are called train, val and test, they are the split.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from client.sources.file_index import IMAGE_SUFFIXES
from client.sources.source_table import TEST_WORDS, TRAIN_WORDS, FileImages, SourceTable
from common.errors import BadRow, UserError
from common.hierarchy import Hierarchy


def folder_source(root: Path) -> SourceTable:
    """Read nested class folders.

    A class is called by its folder, or by ``parent/folder`` on levels where two folders share a name.
    Images at another depth than most are bad rows.

    Raises:
        UserError: the folder is missing or holds no image in a class folder.
    """
    if not root.is_dir():
        raise UserError(f"the image folder is missing: {root}")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    folders = [path.relative_to(root).parent.parts for path in files]
    top = {parts[0].lower() if parts else "" for parts in folders}
    has_split = bool(top) and top <= TEST_WORDS | TRAIN_WORDS
    classes = [parts[1:] if has_split else parts for parts in folders]
    depth = Counter(len(parts) for parts in classes if parts).most_common(1)
    if not depth:
        raise UserError(f"{root} holds no image in a class folder")
    levels = depth[0][0]
    bad = []
    kept = []
    for index, parts in enumerate(classes):
        if len(parts) == levels:
            kept.append(index)
        else:
            reason = f"lies {len(parts)} class folder(s) deep, most images lie {levels} deep"
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
    )


def _unique_names(classes: list[tuple[str, ...]], levels: int) -> list[tuple[str, ...]]:
    """The class names of every path: the folder's, or the whole path where a level has twins."""
    names: list[list[str]] = [[] for _ in classes]
    for level in range(levels):
        prefixes = {parts[: level + 1] for parts in classes}
        twins = len({prefix[-1] for prefix in prefixes}) < len(prefixes)
        for name, parts in zip(names, classes, strict=True):
            name.append("/".join(parts[: level + 1]) if twins else parts[level])
    return [tuple(name) for name in names]
