"""Write files whole or not at all, and read those that grow line by line and those of a spreadsheet.

A reader, a crash or a power cut meets the old content of a file or the new one. Nothing here knows what is
written. Errors are left as the OSError that they are; whoever calls says what the user can do about them.
Delimited tables are read in the encodings and with the separators that spreadsheets write; content that
cannot be read with certainty is refused with a reason, not guessed.
"""

import csv
import errno
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_Sync = Literal["nothing", "content", "name"]
"""What must be on the disk when a write returns: nothing, the content, or the content under its name."""

_SEPARATORS = (",", ";", "\t", "|")
# Workbooks are recognised by their first bytes, so that the error can say what to do with one instead of
# reporting broken text.
_WORKBOOKS = {
    b"PK\x03\x04": "is an Excel workbook (or another zip archive), not text",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook, not text",
}
_SAVE_AS = "save it as CSV UTF-8"
_NAMED_SEPARATOR = re.compile(r"sep=(.)\r?\n")


@contextmanager
def replacing(*paths: Path, mode: int | None = None, sync: _Sync = "name") -> Iterator[list[Path]]:
    """Give an empty file for each path, to be written in the block; they take the paths' names at its end.

    The names are taken in the order of the paths, after the content of all is complete. A block that ends in
    an error leaves every path as it was.

    Args:
        paths: files; their folders exist.
        mode: permissions; a file never has wider ones. None: those of any new file of this process.
        sync: how much must outlive a power cut.
    """
    temporary: list[Path] = []
    try:
        for path in paths:
            temporary.append(_beside(path, mode))
        yield list(temporary)
        if sync != "nothing":
            # Contents first, then the names, then the folders that hold the names: in any other order a power
            # cut could leave a name without its content.
            for path in temporary:
                _sync_path(path)
        for new, path in zip(temporary, paths, strict=True):
            new.replace(path)
        if sync == "name":
            for folder in {path.parent for path in paths}:
                _sync_path(folder)
    except BaseException:
        for path in temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, mode: int | None = None, sync: _Sync = "name") -> None:
    """Write a file in one step, as ``replacing`` does."""
    with replacing(path, mode=mode, sync=sync) as (temporary,):
        temporary.write_bytes(content)


def write_text(path: Path, text: str, mode: int | None = None, sync: _Sync = "name") -> None:
    """Write a text in UTF-8 in one step, with its line ends as they are."""
    write_bytes(path, text.encode(), mode, sync)


def write_json(path: Path, value: Any, indent: int | None = 2, mode: int | None = None) -> None:
    """Write a value as JSON in one step, with a line end after it."""
    write_text(path, json.dumps(value, indent=indent) + "\n", mode)


def create_bytes(path: Path, content: bytes) -> bool:
    """Write a file that its owner alone may read, unless it is there already.

    Returns:
        Whether it was written.
    """
    temporary = _beside(path, 0o600)
    try:
        temporary.write_bytes(content)
        # The content must be on the disk before its name is, as in ``replacing``.
        _sync_path(temporary)
        try:
            os.link(temporary, path)  # unlike a rename, this never replaces a file
        except FileExistsError:
            return False
        _sync_path(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, mode: int = 0o755) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` only when the block ends without an error.

    The parents of ``target`` are made if they are missing, and stay.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is one step only within a file system; hidden, so that nothing takes
    # it for complete.
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(mode)
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock the same folder out of the block, after waiting for them.

    The kernel holds the lock, so a process that was killed leaves it to the next.
    """
    # The folder is locked and no file in it: every write gives a file a new inode, and a lock on the old one
    # would exclude nobody. That is why filelock, which locks a file, would not do.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_path(path: Path) -> None:
    """Wait until a file's content, or the names that a folder holds, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; a file they all can.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _beside(path: Path, mode: int | None) -> Path:
    """Make an empty file in the folder of ``path``: a rename is one step only within a file system."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    # Made narrow and then widened: nobody else may open a secret before it has its mode.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    try:
        if mode is not None:
            os.fchmod(handle, mode)
    finally:
        os.close(handle)
    return temporary


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON objects, one a line, or none where there is no file.

    A last line without its end is left out: a process that was killed while it wrote leaves one.

    Raises:
        ValueError: a complete line is no JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in _lines(content)[0]]


@dataclass(frozen=True)
class _News:
    """Hold the lines that one call found."""

    lines: tuple[dict[str, Any], ...]
    restarted: bool
    """The file is not the one read before, or shorter: ``lines`` begin at its start."""


class JsonLinesFile:
    """Keep the position in a growing file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._position = 0

    def poll(self) -> _News:
        """Return the complete lines that were added since the last call, or none where there is no file.

        A last line without its end is left for the next call. A line that is no JSON object (the disk was
        full in the middle of it) is left out.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            restarted, self._file, self._position = self._file is not None, None, 0
            return _News((), restarted)
        with stream:
            status = os.fstat(stream.fileno())
            file = (status.st_dev, status.st_ino)
            # A replaced file has another inode, and one that was cut in place ends before the position.
            restarted = self._file is not None and (file != self._file or status.st_size < self._position)
            if restarted:
                self._position = 0
            self._file = file
            stream.seek(self._position)
            lines, read = _lines(stream.read())
        self._position += read
        return _News(tuple(_objects(lines)), restarted)


def newest_json_lines(path: Path, most: int = 2**20) -> Iterator[dict[str, Any]]:
    """Yield the objects at the end of such a file, the newest first, and no line that is torn or edited.

    Args:
        path: the file, which may be missing.
        most: bytes of its end that are read.
    """
    try:
        with path.open("rb") as stream:
            start = max(stream.seek(0, os.SEEK_END) - most, 0)
            stream.seek(start)
            # Read from the middle of a file, the first line is most likely cut.
            lines = stream.read().splitlines()[1 if start else 0 :]
    except FileNotFoundError:
        return
    yield from _objects(reversed(lines))


def _lines(content: bytes) -> tuple[list[bytes], int]:
    """Return the lines that have their end, and the bytes that they take."""
    read = content.rfind(b"\n") + 1
    return content[:read].split(b"\n")[:-1], read


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                yield value


class TableError(Exception):
    """Report that a file is not a table.

    ``line`` is 1-based, or None where the fault concerns all of the file.
    """

    def __init__(self, line: int | None, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(reason)


def read_rows(data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of every row that is not empty, the header first.

    The text is UTF-8 or UTF-16 with a byte order mark. The separator is the one of ``_SEPARATORS`` that gives
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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a UTF-8 CSV with Unix line ends that ``read_rows`` reads back, whatever the names are."""
    # A header that another separator would cut, or that looks like Excel's line, is quoted, so that it is
    # read as it was meant.
    unclear = any(mark in cell for cell in header for mark in _SEPARATORS[1:]) or header[0].startswith("sep=")
    with path.open("w", newline="", encoding="utf-8") as stream:
        usual = csv.writer(stream, lineterminator="\n")
        quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
        (quoted if unclear else usual).writerow(header)
        usual.writerows(rows)


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
