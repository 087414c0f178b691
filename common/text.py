"""Make text from other parties safe to show on a terminal or in a report.

A character that a terminal would act upon or hide is replaced by a visible escape. This module knows
nothing of where the text comes from and where it is shown.

Read delimited tables in the encodings and with the separators that spreadsheets write.

This module knows nothing of columns. Content that cannot be read with certainty is refused with a reason,
not guessed.
"""

import csv
import io
import re
from collections.abc import Iterator

_REASON_CHARACTERS = 300
"""The longest reason that is kept of a reply that was not used."""


def visible(text: str, *, keep: str = "") -> str:
    r"""Return the text with every character that is not printable written as its escape, such as ``\x1b``.

    Control characters, line ends, marks that turn the direction of writing, invisible characters and halves
    of surrogate pairs are not printable; letters of any script are.

    Args:
        text: any text.
        keep: characters that stay as they are, such as a line end.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def visible_lines(text: str) -> str:
    """Return the text as ``visible`` does, with its line ends and tabs kept."""
    return visible(text, keep="\n\t")


def one_line(text: str, limit: int = _REASON_CHARACTERS) -> str:
    """Return the text on one visible line, cut to ``limit`` characters with an ellipsis.

    Args:
        text: any text, of any length.
        limit: at least 1.
    """
    # Cut before escaping: the text may be megabytes from a hostile site, and an escape is longer than the
    # character that it stands for.
    start = visible(text[: limit + 1])
    return start if len(start) <= limit else start[: limit - 1] + "…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


_SEPARATORS = (",", ";", "\t", "|")

# Workbooks are recognised by their first bytes, so that the error can say what to do with one instead of
# reporting broken text.
_WORKBOOKS = {
    b"PK\x03\x04": "is an Excel workbook (or another zip archive), not text",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook, not text",
}
_SAVE_AS = "save it as CSV UTF-8"
_NAMED_SEPARATOR = re.compile(r"sep=(.)\r?\n")


class TableError(Exception):
    """Report that a file is not a table.

    ``line`` is 1-based, or None where the fault concerns all of the file.
    """

    def __init__(self, line: int | None, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(reason)


def read_rows(data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of every row that is not empty, the header first.

    The text is UTF-8 or UTF-16 with a byte order mark. The separator is the one of SEPARATORS that gives
    the header the most cells, or the one that Excel's line ``sep=;`` names.

    Raises:
        TableError: a workbook, another encoding, or broken quotes.
    """
    text = _decode(data)
    skipped = 0
    # A first line such as ``sep=;`` names the separator for Excel, so it outranks the count of cells.
    if named := _NAMED_SEPARATOR.match(text):
        text, separator, skipped = text[named.end() :], named[1], 1
    else:
        first = text.split("\n", 1)[0]
        separator = max(_SEPARATORS, key=lambda mark: _cells(first, mark))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num + skipped, cells
    except csv.Error as error:
        raise TableError(reader.line_num + skipped, f"is not CSV: {error}") from None


def _cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:
        return 0


def _decode(data: bytes) -> str:
    for start, reason in _WORKBOOKS.items():
        if data.startswith(start):
            raise TableError(None, f"{reason}; open it there and {_SAVE_AS}")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TableError(line, f"is not UTF-8 (Windows-1252, perhaps); {_SAVE_AS}") from None
