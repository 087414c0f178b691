"""Check a ledger file, and keep its composed privacy loss so that only newer events are composed again.

A check lists every problem by row, changes nothing and trusts nothing. The chain shows what was edited,
deleted in the middle, or reordered. An old copy put back, or a wholly rewritten ledger, is consistent in
itself: those show only against what is kept elsewhere, such as the site's anchor, or the head in the newest
privacy statement that the server holds.

The kept privacy loss is a copy of what can be computed from the ledger. It is dropped, and everything is
composed again, unless

- this site wrote it: an HMAC under the site's secret covers all of it. Whoever can write the file, and can
  neither read nor replace the secret, cannot make the site understate what it spent. Whoever owns the site
  folder can, as they can rewrite the ledger; `fedbags ledger verify` composes from the events alone;
- the same version of the accountant wrote it;
- the ledger's chain holds the very row after which it was written, so another ledger's file, or one newer
  than a ledger that was rolled back, is not used.

In addition, what it composes must be among the ledger's events (``common.privacy.accounting``), so that
an older file of the same ledger costs time only.
"""

import hmac
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client import site
from client.ledger.anchor import AnchorFile, LedgerLostError, lost_marks
from client.ledger.file import (
    NO_ROW,
    SCHEMA,
    Entry,
    LedgerError,
    check_version,
    newest_written,
    open_file,
    parse_row,
)
from client.ledger.state import LedgerState
from common.errors import UserError, require_file
from common.files import write_bytes
from common.privacy import accounting
from common.privacy.accounting import Composition, amounts_of, fits
from common.privacy.events import Adjacency, Unit


@dataclass(frozen=True)
class _Problem:
    """Describe one thing that is wrong with a ledger file."""

    row: int | None
    """1-based row of the ledger; None when it concerns the file as a whole."""
    reason: str

    def __str__(self) -> str:
        return self.reason if self.row is None else f"row {self.row}: {self.reason}"


def verify(
    path: Path, head: str | None = None, site: str | None = None, anchor: AnchorFile | None = None
) -> list[_Problem]:
    """Check a ledger file and return what is wrong with it.

    Args:
        path: the file.
        head: the ledger head of a privacy statement that this site once sent, as the server holds it.
        site: whose ledger it should be.
        anchor: the ledger's anchor, if it is to be compared.

    Returns:
        Everything that is wrong, in the order of the rows; empty when the file can be believed.

    Raises:
        UserError: there is no such file.
    """
    require_file(path, "the privacy ledger", "Give the ledger.sqlite of a site.")
    entries: list[Entry] = []
    problems: list[_Problem] = []
    try:
        # Not ``reading`` and ``read_entries``, which stop at the first fault: the user is to see all of them.
        with open_file(path) as db:
            check_version(db, path)
            problems += _check_file(db)
            problems += _check_chain(db, entries)
    except LedgerError as error:
        problems.append(_Problem(None, str(error)))
    except sqlite3.DatabaseError as error:
        where = len(entries) + 1 if entries else None
        problems.append(_Problem(where, f"the file is damaged from here on ({error}): torn or overwritten"))
    if not problems:
        problems += _check_meaning(entries)
    if site is not None and entries and entries[0].body.get("site") != site:
        problems.append(
            _Problem(1, f"this is the ledger of site {entries[0].body.get('site')!r}, not {site!r}")
        )
    if head is not None and head not in {entry.hash for entry in entries}:
        problems.append(
            _Problem(
                len(entries) or None,
                f"no row has the head {head[:12]}... that the server was told: the file is an older copy "
                "(spending is missing), was rewritten, or is another site's",
            )
        )
    if anchor is not None:
        problems += _check_anchor(anchor, entries)
    return problems


def _check_anchor(anchor: AnchorFile, entries: list[Entry]) -> list[_Problem]:
    try:
        found = anchor.read()
        state = LedgerState.of(entries)
    except LedgerLostError as error:
        return [_Problem(None, str(error))]
    except LedgerError:
        return []  # reported already, with its row
    hashes = {entry.seq: entry.hash for entry in entries}
    if found is None or not lost_marks([found.mark], state, hashes.get):
        return []
    return [
        _Problem(
            len(entries) or None,
            f"the site once wrote row {found.rows} with the head {found.head[:12]}..., says {anchor.path}: "
            "the file is an older copy (spending is missing), was rewritten, or is another site's",
        )
    ]


def _check_file(db: sqlite3.Connection) -> list[_Problem]:
    problems = [
        _Problem(None, f"the file is damaged: {text}")
        for (text,) in db.execute("PRAGMA integrity_check(20)")
        if text != "ok"
    ]
    found = {text for (text,) in db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
    # Exact texts: a trigger that was weakened rather than dropped must show as well.
    if found != set(SCHEMA):
        problems.append(_Problem(None, "the table or the triggers that keep it append-only were changed"))
    (rows,) = db.execute("SELECT coalesce(max(seq), 0) FROM entries").fetchone()
    written = newest_written(db)
    if written > rows:
        problems.append(_Problem(rows + 1, f"deleted, with all rows up to {written}"))
    return problems


def _check_chain(db: sqlite3.Connection, entries: list[Entry]) -> list[_Problem]:
    """Check every row against the one before it, and collect the readable rows in ``entries``."""
    problems = []
    expected, previous = 1, NO_ROW
    for row in db.execute("SELECT * FROM entries ORDER BY seq"):
        entry, problem = parse_row(row, expected, previous)
        if problem:
            problems.append(_Problem(int(row[0]), problem))
        if entry is not None:
            entries.append(entry)
        # Go on from what stands there, so that one bad row is one problem and not one a row.
        expected, previous = int(row[0]) + 1, str(row[4])
    return problems


def _check_meaning(entries: list[Entry]) -> list[_Problem]:
    """Check that the rows of a sound chain have known content and stayed within the cap."""
    state = LedgerState()
    for entry in entries:
        try:
            state.add(entry)
        except LedgerError as error:
            return [_Problem(entry.seq, str(error))]
    if not entries:
        return [_Problem(None, "the ledger holds no row")]
    # Composed afresh from the events: the carried composition is a file that its owner could have
    # written.
    if not fits(state.events, state.cap.epsilon, state.cap.delta, Adjacency.REPLACE_ONE, afresh=True):
        return [_Problem(entries[-1].seq, f"more than the cap of {state.cap.epsilon:g} was spent")]
    return []


_CARRY_SUFFIX = ".composed"
"""Takes the place of the ledger's own, beside it."""
_PURPOSE = "composed-privacy-loss"
_FORMAT = 1
"""Raise it when grids or bounds are chosen in another way."""
_SEAL_BYTES = 32


class CarryFile:
    """Read and write the composed privacy loss of one ledger.

    Nothing is written before a ledger has more than ``composition.DIRECT`` events.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_suffix(_CARRY_SUFFIX)
        self._written: tuple[Composition, ...] = ()

    def recall(self, state: LedgerState, hash_of: Callable[[int], str | None]) -> None:
        """Load the file into memory if it can be trusted and memory has nothing of this ledger yet.

        Args:
            state: the ledger.
            hash_of: the hash of a row of its file, None where there is no such row.
        """
        if not _is_long(state) or _kept_of(state):
            return
        try:
            content = self.path.read_bytes()
            seal, content = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
            # The seal is checked before anything is parsed: nothing of a foreign file reaches the
            # unpacking code.
            if not hmac.compare_digest(seal, self._seal(content)):
                return
            about, compositions = accounting.unpack(content)
        except (OSError, UserError, ValueError, KeyError, zipfile.BadZipFile):
            return  # there is none, or none that this site's code writes: everything is composed again
        # The head is read from this ledger: the file of another ledger, or of rows that were rolled back,
        # does not match.
        if about != _about(state, about["rows"], hash_of(about["rows"])):
            return
        for carried in compositions:
            accounting.keep(carried)
        self._written = compositions

    def keep(self, state: LedgerState) -> None:
        """Write what memory holds of this ledger's composition, if that is more than the file holds."""
        if not _is_long(state):
            return
        kept = _kept_of(state)
        if not kept or set(kept) <= set(self._written):
            return
        content = accounting.pack(kept, _about(state, state.rows, state.head))
        # The ledger holds what counts: where this file cannot be written, the next process takes longer.
        with suppress(OSError, UserError):
            write_bytes(self.path, self._seal(content) + content, 0o600, sync="nothing")
            self._written = kept

    def _seal(self, content: bytes) -> bytes:
        return site.derive(self.path.parent, _PURPOSE, content)


def _is_long(state: LedgerState) -> bool:
    return len(state.events_for(state.unit)) > accounting.DIRECT


def _kept_of(state: LedgerState) -> tuple[Composition, ...]:
    """Return the compositions in memory of the ledger's events, scaled to its unit and to a bag."""
    kept: dict[Composition, None] = {}
    for unit in dict.fromkeys((state.unit, Unit.BAG)):
        kept |= dict.fromkeys(accounting.kept_for(amounts_of(state.events_for(unit)), Adjacency.REPLACE_ONE))
    return tuple(kept)


def _about(state: LedgerState, rows: int, head: str | None) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "accountant": version("dp-accounting"),
        "site": state.site,
        "rows": rows,
        "head": head,
    }
