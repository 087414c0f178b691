"""Tables as spreadsheets save them: read for what they are, or refused by name."""

import io
import zipfile
from pathlib import Path

import pytest

from client.data.tables import CsvTable, read_csv, whole_number
from common.errors import BadRow, DataError
from common.files import TableError, read_rows
from common.hierarchy import Hierarchy

ROWS = [["kind", "leaf"], ["warm", "a, b"], ["cold", "größe"]]


def text(separator: str, end: str = "\n") -> str:
    return end.join(separator.join(f'"{cell}"' for cell in row) for row in ROWS) + end


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_and_trees_of_every_separator_line_end_and_mark(
    tmp_path: Path, separator: str, end: str, encoding: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(text(separator, end).encode(encoding))
    table = read_csv(path, ("kind",), [], [])
    assert table is not None
    assert [list(row.values()) for row in table.rows] == ROWS[1:]
    assert table.lines == (2, 3)
    assert Hierarchy.from_csv(path).to_rows() == ROWS[1:]


def test_excels_separator_line_is_obeyed_and_counted() -> None:
    rows = list(read_rows(b"sep=;\r\na,b;c\r\n1,2;3\r\n"))
    assert rows == [(2, ["a,b", "c"]), (3, ["1,2", "3"])]


def test_a_table_of_one_column_keeps_its_commas_quoted() -> None:
    assert list(read_rows(b'leaf\n"a, b"\n\nc\n')) == [(1, ["leaf"]), (2, ["a, b"]), (4, ["c"])]


def workbook() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        packed.writestr("xl/workbook.xml", "<workbook/>")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (workbook(), None, "is an Excel workbook .*save it as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", None, "is an old Excel workbook"),
        (
            "a,b\nx,Größe\n".encode("cp1252"),
            2,
            r"is not UTF-8 \(Windows-1252, perhaps\); save it as CSV UTF-8",
        ),
        (b'a,b\n"x,1\n', 2, "is not CSV"),
    ],
)
def test_what_is_no_table_is_called_what_it_is(
    tmp_path: Path, data: bytes, line: int | None, reason: str
) -> None:
    with pytest.raises(TableError, match=reason) as caught:
        list(read_rows(data))
    assert caught.value.line == line
    (tmp_path / "x.csv").write_bytes(data)
    fatal: list[BadRow] = []
    assert read_csv(tmp_path / "x.csv", (), fatal, []) is None
    assert (fatal[0].row, fatal[0].reason) == (line, caught.value.reason)
    with pytest.raises(DataError, match=reason):
        Hierarchy.from_csv(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("cell", "number"),
    [("2", 2), ("2.0", 2), ("2,0", 2), ("2.", 2), ("0", 0), ("007", 7)]
    + [
        (cell, None)
        for cell in ("", "-1", "2.5", "2,05", "1e3", "two", "1 000", "1.000.000", "9999999999", "²")
    ],
)
def test_counts_as_spreadsheets_write_them(cell: str, number: int | None) -> None:
    assert whole_number(cell) == number


def test_columns_are_found_in_any_case() -> None:
    table = CsvTable("x.csv", ("Bag", "IMAGE"), (), ())
    assert table.column(("image", "bag")) == "IMAGE"
    assert table.column(("count",)) is None
