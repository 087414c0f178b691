"""Read the CSV tables of a hospital, with the line on which each row stood.

Faults are collected, not raised, so that a user sees all of them at once.

Compare class names that people write in several ways, and find the one that was meant.

``Nevus``, ``nevus`` and ``nevus`` with a blank of no width are one class to whoever wrote them. They are
never joined in silence: a source refuses them, or joins them where that was asked for.
"""

import csv
import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import BadRow, DataError
from common.hierarchy import Hierarchy
from common.text import TableError, read_rows

_WHOLE = re.compile(r"([0-9]{1,9})(?:[.,]0*)?")


@dataclass(frozen=True)
class CsvTable:
    """Hold the rows of one file.

    ``rows[i]`` maps each column to its stripped cell and stood on ``lines[i]``.
    """

    file: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        return zip(self.lines, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, names: Sequence[str]) -> str | None:
        """Return the first of these columns that the table has, whatever their case, or None."""
        by_name = {name.lower(): name for name in reversed(self.columns)}
        return next((by_name[name] for name in names if name in by_name), None)


def read_csv(path: Path, required: Sequence[str], fatal: list[BadRow], bad: list[BadRow]) -> CsvTable | None:
    """Read a table with a header, collecting its faults.

    ``common.text`` decides which encodings and separators are read.

    Args:
        path: the file; faults name it by its last part.
        required: columns that must be there; others are kept too.
        fatal: receives what makes the whole file unusable (missing, not text, no such column).
        bad: receives rows whose number of cells differs from the header's; they are left out.

    Returns:
        The table, or None when something was added to ``fatal``.
    """
    file = path.name
    try:
        data = path.read_bytes()
    except OSError as error:
        fatal.append(BadRow(file, None, f"cannot be read: {error.strerror or error}"))
        return None
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    columns: tuple[str, ...] = ()
    try:
        numbered = read_rows(data)
        columns = tuple(name.strip() for name in next(numbered, (1, []))[1])
        missing = [name for name in required if name not in columns]
        if missing or len(set(columns)) != len(columns):
            what = f"lacks column(s) {missing}" if missing else "names a column twice"
            fatal.append(BadRow(file, 1, f"the header {what}; it has {list(columns)}"))
            return None
        for line, cells in numbered:
            if len(cells) != len(columns):
                bad.append(BadRow(file, line, f"{len(cells)} cells where the header has {len(columns)}"))
                continue
            rows.append({name: cell.strip() for name, cell in zip(columns, cells, strict=True)})
            lines.append(line)
    except TableError as error:
        fatal.append(BadRow(file, error.line, error.reason))
        return None
    return CsvTable(file, columns, tuple(rows), tuple(lines))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a UTF-8 CSV with a header and Unix line ends."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def whole_number(cell: str) -> int | None:
    """Return the integer >= 0 that a cell holds (``2``, or ``2.0`` from a spreadsheet), or None."""
    match = _WHOLE.fullmatch(cell)
    return int(match[1]) if match else None


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
