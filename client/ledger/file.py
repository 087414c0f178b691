"""Read and write the ledger's file, an append-only chain of hashed rows in SQLite.

Knows no budgets. Each row holds one JSON object, and its hash covers the row before it, so that a change
anywhere shows in all that follows. The chain is no lock: whoever can write the file can write an all new
chain. That, and an old copy put back, show only against a hash that is kept elsewhere: the server keeps the
head that comes with each privacy statement (``client.ledger.check``).
"""

import hashlib
import json
import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError

LEDGER_FILE = "ledger.sqlite"
"""The file's name in the folder of a site."""
_SCHEMA_VERSION = 1
_APPLICATION_ID = 0x66646C67
"""Tells our file from any other SQLite file ("fdlg")."""
NO_ROW = "0" * 64
"""What stands for the hash before the first row."""
_SALT, _SALT_BYTES = "salt", 16
"""The key of a row's random part, and its length: a hash that leaves the site tells nothing of the row."""
_WAIT_SECONDS = 60.0
"""How long to wait for another process that holds the file."""

SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "previous TEXT NOT NULL, hash TEXT NOT NULL)",
    # The triggers stop a mistake in our own code. They stop no attacker, who can drop them first; the
    # chain shows what was edited then.
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    # Also refuses INSERT OR REPLACE, whose silent deletion fires no other trigger.
    "CREATE TRIGGER no_replace BEFORE INSERT ON entries "
    "WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM entries) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
_PRAGMAS = (
    # A rollback journal rather than a WAL: what is committed is in this one file, and can be copied.
    "PRAGMA journal_mode = DELETE",
    # FULL, and the folder is synced too: a commit that a power cut could undo would hide spending.
    "PRAGMA synchronous = EXTRA",
)


class Kind(StrEnum):
    """Name what a row of the ledger records."""

    OPENED = "opened"
    """Site, data version and cap from here on; the first row, and again when one changes."""
    RESERVED = "reserved"
    """An event counts as spent from here on, whatever becomes of it."""
    CONFIRMED = "confirmed"
    """The round of a reservation was finished. Changes nothing in what is spent."""
    RELEASED = "released"
    """Noised counts with their event: drawn, charged and stored in one row."""
    ACCEPTED = "accepted"
    """The site's owner said that a new data version is the same site's data. Budgets go on composing."""
    REFUSED = "refused"
    """An event that the cap did not allow. Costs nothing."""
    LOST = "lost"
    """The site's owner said that rows of this site's ledger are lost; what is known of them counts on."""
    CARRIED = "carried"
    """What all rows so far come to, so that nobody has to read them again. Changes nothing."""


@dataclass(frozen=True)
class Entry:
    """Represent one row of the ledger."""

    seq: int
    kind: str
    body: Mapping[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Mark:
    """Hold the length of a ledger's chain at some time, with its newest hash then."""

    rows: int
    head: str


class LedgerError(UserError):
    """Report a file that is not a ledger that can be trusted, or is another one than was asked for."""


class LedgerBusyError(RunError):
    """Report that the ledger could not be written, so that nothing new was granted.

    The disk may be full, the permission missing, or the file locked by another process.
    """


def _canonical(body: Mapping[str, Any]) -> str:
    """Return the one JSON text that a row's content is hashed and stored as."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _chain_hash(previous: str, seq: int, kind: str, body: str) -> str:
    """Return the SHA-256 over the hash of the row before and this row's canonical JSON, as hexadecimal."""
    # Number and kind are hashed as well: else a row could be moved, or a charge relabelled as a refusal.
    row = _canonical({"seq": seq, "kind": kind, "body": body})
    return hashlib.sha256(f"{previous}\n{row}".encode()).hexdigest()


def create(path: Path, body: Mapping[str, Any]) -> None:
    """Make a ledger whose first row holds ``body``, unless another process has made one meanwhile.

    The file appears complete or not at all: an empty ledger file is never one of ours, so an emptied one
    cannot pass for a fresh one.

    Raises:
        UserError: the folder cannot be written to.
        LedgerBusyError: the disk is full.
    """
    try:
        # The temporary file must be in the same folder: a hard link cannot cross file systems.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise UserError(f"the privacy ledger {path} cannot be made: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        with open_file(temporary) as db:
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            append(db, None, Kind.OPENED, body)
            db.execute("COMMIT")
        temporary.chmod(0o644)
        try:
            os.link(temporary, path)  # unlike a rename, this never replaces a file
        except FileExistsError:
            return  # another process was faster; its file is as good
        folder = os.open(path.parent, os.O_RDONLY)
        # SQLite synced the content; without this, a power cut could still lose the name, and with it the
        # ledger.
        os.fsync(folder)
        os.close(folder)
    except (OSError, sqlite3.Error) as error:
        raise LedgerBusyError(f"the ledger {path.name} cannot be made: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold the file alone for one transaction, durable at the end of the block and undone by an exception.

    Raises:
        LedgerBusyError: the disk is full, the file is locked or cannot be written.
        LedgerError: the file is damaged, or no ledger of this version.
    """
    try:
        with open_file(path) as db:
            db.execute("BEGIN IMMEDIATE")
            check_version(db, path)
            yield db
            db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise LedgerBusyError(f"the ledger {path.name} cannot be written: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open one consistent view of the file for the length of a block.

    Raises:
        LedgerError: the file is damaged, or no ledger of this version.
    """
    try:
        with open_file(path) as db:
            db.execute("BEGIN")
            check_version(db, path)
            yield db
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def append(db: sqlite3.Connection, last: Entry | None, kind: Kind, body: Mapping[str, Any]) -> Entry:
    """Add one row with a salt of its own after ``last``, the newest row of the file."""
    seq, previous = (last.seq + 1, last.hash) if last else (1, NO_ROW)
    # Without the salt, whoever knows all of a row but one count would find the count by trying hashes.
    text = _canonical({**body, _SALT: secrets.token_hex(_SALT_BYTES)})
    entry = Entry(seq, kind.value, json.loads(text), previous, _chain_hash(previous, seq, kind.value, text))
    db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (seq, entry.kind, text, previous, entry.hash))
    return entry


def read_entries(db: sqlite3.Connection, path: Path, last: Entry | None = None) -> list[Entry]:
    """Return the rows after ``last``, or all rows without it, checked against the chain.

    Raises:
        LedgerError: a row does not continue the chain, or ``last`` is no longer in the file.
    """
    seq, previous = (last.seq, last.hash) if last else (0, NO_ROW)
    if last and db.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone() != (previous,):
        raise LedgerError(
            f"the ledger {path} lost row {seq}, which it had: an older copy was put in its place"
        )
    entries = []
    for row in db.execute("SELECT * FROM entries WHERE seq > ? ORDER BY seq", (seq,)):
        entry, problem = parse_row(row, seq + 1, previous)
        if entry is None or problem:
            raise LedgerError(
                f"the ledger {path} cannot be trusted: row {seq + 1}: {problem}\n"
                f"`fedbags ledger verify {path}` lists every such row."
            )
        entries.append(entry)
        seq, previous = entry.seq, entry.hash
    # Rows cut off at the end leave a sound chain behind. SQLite's counter still knows that they were
    # there.
    if newest_written(db) > seq:
        raise LedgerError(f"the ledger {path} lost its newest rows, from row {seq + 1} on (deleted)")
    return entries


def newest_of_kind(db: sqlite3.Connection, kind: Kind, rows: int | None = None) -> int:
    """Return the number of the newest row of a kind up to row ``rows``, or 0 if there is none.

    ``rows`` is the newest row of the file if None.
    """
    row = db.execute(
        "SELECT seq FROM entries WHERE kind = ? AND seq <= ? ORDER BY seq DESC LIMIT 1",
        (kind, newest_written(db) if rows is None else rows),
    ).fetchone()
    return int(row[0]) if row else 0


def read_entry(db: sqlite3.Connection, path: Path, seq: int) -> Entry:
    """Return one row, checked against its own hash but not against the row before it.

    Raises:
        LedgerError: it is missing, or its content does not match its hash.
    """
    row = db.execute("SELECT * FROM entries WHERE seq = ?", (seq,)).fetchone()
    entry, problem = parse_row(row, seq, row[3]) if row else (None, "is missing (deleted)")
    if entry is None or problem:
        raise LedgerError(f"the ledger {path} cannot be trusted: row {seq}: {problem}")
    return entry


def hash_of(db: sqlite3.Connection, seq: int) -> str | None:
    """Return the hash of a row, or None if there is no such row."""
    row = db.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
    return str(row[0]) if row else None


def holds(db: sqlite3.Connection, head: str) -> bool:
    """Return whether a row of the file has this hash."""
    return db.execute("SELECT 1 FROM entries WHERE hash = ?", (head,)).fetchone() is not None


def newest_written(db: sqlite3.Connection) -> int:
    """Return the highest row number that SQLite ever gave out in this file.

    SQLite keeps it apart from the rows, so it outlives a row that was deleted.
    """
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
    return int(row[0]) if row else 0


def parse_row(row: tuple[Any, ...], seq: int, previous: str) -> tuple[Entry | None, str]:
    """Parse row ``seq``, which should follow the hash ``previous``, and describe its fault.

    Returns:
        The row, or None if it cannot be parsed; and the fault, or an empty text.
    """
    found, kind, text, before, own = row
    try:
        body = json.loads(text)
        entry = Entry(int(found), str(kind), body if isinstance(body, dict) else {}, str(before), str(own))
        recomputed = _chain_hash(before, found, kind, text)
    except (TypeError, ValueError):
        return None, "is not a row of the ledger (edited)"
    if recomputed != own:
        return entry, "its content does not match its hash (edited)"
    if found != seq:
        return entry, f"row {seq} is missing before it (deleted)"
    if before != previous:
        return entry, "does not follow the row before it (deleted, reordered or replaced)"
    return entry, ""


def check_version(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is no ledger of the schema that this release reads.

    Raises:
        LedgerError: it is another file, or of another schema.
    """
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise LedgerError(f"{path} is not a privacy ledger (it may be empty, torn or another file)")
    if version != _SCHEMA_VERSION:
        raise LedgerError(
            f"the ledger {path} has schema {version}; this release reads schema {_SCHEMA_VERSION}. "
            "Use the release that wrote it."
        )
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
        raise LedgerError(f"the ledger {path} is damaged: its table is missing")


def _damaged(path: Path, error: Exception) -> LedgerError:
    """Return the error for a file that SQLite itself cannot read."""
    return LedgerError(
        f"the ledger {path} is damaged: {error}\nPut back the newest intact copy that agrees with the "
        "server's statements (`fedbags ledger verify --head HASH`)."
    )


@contextmanager
def open_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file without checking it, and close it at the end of the block."""
    # mode=rw: never creates a file, and can undo what a killed process left half written.
    db = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=_WAIT_SECONDS, isolation_level=None
    )
    try:
        for pragma in _PRAGMAS:
            db.execute(pragma)
        yield db
    finally:
        db.close()
