"""Compare class names that people write in several ways, and find the one that was meant.

``Nevus``, ``nevus`` and ``nevus`` with a blank of no width are one class to whoever wrote them. They are
never joined in silence: a source refuses them, or joins them where that was asked for.
"""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from common.errors import BadRow, DataError
from common.hierarchy import Hierarchy


def fold(name: str) -> str:
    """Return the name in one case and Unicode form, without invisible, doubled or outer blanks."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    # Normalised a second time: letters that an invisible sign kept apart may combine now.
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


def did_you_mean(name: str, known: Iterable[str], alike: float = 0.75) -> str:
    """Return a hint at the known name most like this one, or an empty text if none is near.

    ``alike`` is difflib's ratio in [0, 1] that a name must reach; of numbered names many are nearly alike.
    """
    choices = {fold(other): other for other in known}
    near = difflib.get_close_matches(fold(name), choices, n=1, cutoff=alike)
    return f"; did you mean {choices[near[0]]!r}?" if near else ""


def unknown_label(name: str, tree: Hierarchy) -> str:
    """Describe a label that is no leaf, and whether it is a coarser class or near a leaf."""
    for level, classes in zip(tree.levels[:-1], tree.classes[:-1], strict=True):
        if name in classes:
            return f"label {name!r} is a class of level {level}; counts and labels are of leaves"
    return f"unknown label {name!r}; it is no leaf of the hierarchy{did_you_mean(name, tree.classes[-1])}"


def refuse_twins(tree: Hierarchy, file: str) -> None:
    """Refuse a tree in which two classes of a level differ only by case, blanks or the form of a letter.

    Raises:
        DataError: there are such classes; all are named.
    """
    rows = []
    for level, classes in zip(tree.levels, tree.classes, strict=True):
        first: dict[str, str] = {}
        for name in classes:
            twin = first.setdefault(fold(name), name)
            if twin != name:
                reason = f"{level} {name!r} and {twin!r} differ only by case, blanks or the form of a letter"
                rows.append(BadRow(file, None, f"{reason}; did you mean {twin!r}?"))
    if rows:
        advice = "Write each class in one way; --fold-case joins such classes of tables and folders."
        raise DataError(f"{len(rows)} class(es) are written in two ways", rows, advice)


def usual_spellings(names: Sequence[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Return for every name the spelling to use, a known one or the most frequent that folds alike.

    Of spellings that are equally frequent the first in the order of the alphabet is used.
    """
    chosen: dict[str, str] = {}
    for name, _ in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])):
        chosen.setdefault(fold(name), name)
    chosen |= {fold(name): name for name in known}
    return {name: chosen[fold(name)] for name in set(names)}
