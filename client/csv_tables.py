"""Read the CSV tables of a hospital, with the line on which each row stood.

Faults are collected, not raised, so that a user sees all of them at once.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.delimited import TableError, read_rows
from common.errors import BadRow

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

    ``common.delimited`` decides which encodings and separators are read.

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
