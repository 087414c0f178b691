"""Check a ledger file, and record a loss that the site's owner accepts.

A check lists every problem by row, changes nothing and trusts nothing. The chain shows what was edited,
deleted in the middle, or reordered. An old copy put back, or a wholly rewritten ledger, is consistent in
itself: those show only against what is kept elsewhere, such as the site's anchor, or the head in the newest
privacy statement that the server holds.

Only the site's owner can accept a loss, by hand (``fedbags ledger accept-loss``). A server cannot. What is
known of the lost rows is charged.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ledger.anchor import Anchor, AnchorFile, LedgerLostError, lost_events, lost_marks
from client.ledger.file import (
    NO_ROW,
    SCHEMA,
    Entry,
    Kind,
    LedgerError,
    Mark,
    check_version,
    create,
    hash_of,
    holds,
    newest_written,
    open_file,
    parse_row,
)
from client.ledger.ledger import Ledger, Opening, new_identifier, now
from client.ledger.state import LedgerState, Tally
from common.errors import require_file
from common.privacy.accounting import fits
from common.privacy.events import Adjacency, PoissonGaussian

_LEAST_CAP = 1e-9
_NO_NOISE = PoissonGaussian(sample_rate=1.0, noise_multiplier=0.0, steps=1)
"""Stands for spending that nobody knows: no epsilon bounds it."""
_UNKNOWN_ROWS = 0
"""Stands for the length of a chain of which only the newest hash is known."""


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


def accept_loss(ledger: Ledger, site: str, head: str | None = None) -> bool:
    """Record that the site's owner accepts the loss of ledger rows, and charge what is known of them.

    Spending that the anchor records and the ledger does not is charged. Where a witness names rows that no
    readable anchor covers, an event without noise is charged too: nobody knows what was spent, so the whole
    budget counts as spent.

    Args:
        ledger: for the site's data as it is now, which is taken as accepted in a new ledger, with its anchor
            and the other witnesses of its chain. A missing one is made anew.
        site: the site's name.
        head: the ledger head that the coordinator holds of this site, 64 hexadecimal digits.

    Returns:
        False when nothing is lost; nothing is written then.

    Raises:
        LedgerError: the ledger there is damaged, or another site's, or the anchor is.
        LedgerBusyError: the file cannot be written.
    """
    path, anchor, seen = ledger.path, ledger.anchor, ledger.seen
    unreadable, anchored = False, None
    try:
        anchored = anchor.read()
    except LedgerLostError:
        # A damaged anchor is a loss like any other: what it recorded is unknown, so the whole budget will
        # count as spent.
        unreadable = True
    if anchored is not None and anchored.site != site:
        raise LedgerError(f"the anchor {anchor.path} is of site {anchored.site!r}, not of {site!r}")
    if not path.exists():
        if anchored is None and not unreadable and not seen and head is None:
            return False
        # Where no cap is known, the smallest: opening with the site's own records that one.
        epsilon, delta = (anchored.cap_epsilon, anchored.cap_delta) if anchored else (_LEAST_CAP, _LEAST_CAP)
        opening = Opening(site, ledger.data_version, epsilon, delta).body()
        create(path, {**opening, "identifier": new_identifier(), "time": now()})
    # Unchecked, because the check would refuse exactly the ledger that is to be mended here.
    with ledger.transaction(checked=False) as db:
        state = ledger.state
        if state.site != site:
            raise LedgerError(f"the ledger {path} is of site {state.site!r}, not of {site!r}")
        marks = [*([anchored.mark] if anchored else []), *seen]
        lost = lost_marks(dict.fromkeys(marks), state, lambda seq: hash_of(db, seq))
        # The coordinator's head finds a loss even if ledger, anchor and journal were all replaced
        # together.
        if (
            head is not None
            and head not in {mark.head for mark in marks} | state.lost
            and not holds(db, head)
        ):
            lost.append(Mark(_UNKNOWN_ROWS, head))
        if not lost and not unreadable:
            return False
        body = {
            "events": _charged(lost, anchored, state),
            "heads": [mark.head for mark in lost],
            "rows": [mark.rows for mark in lost],
        }
        ledger.append(db, Kind.LOST, body)
    return True


def _charged(lost: Sequence[Mark], anchored: Anchor | None, state: LedgerState) -> Tally:
    """Return the events that a loss costs.

    They are what the anchor counts as spent and the ledger does not, and an event without a bound if a mark
    names rows that the anchor does not cover.
    """
    reaches = anchored.rows if anchored is not None and anchored.mark in lost else _UNKNOWN_ROWS
    known = lost_events(anchored, state) if anchored is not None and reaches else []
    # A chain as long as the anchor's, or shorter, is taken for the beginning of the anchor's own, unless the
    # ledger holds the anchor's: then it is another.
    if anchored is not None and all(_UNKNOWN_ROWS < mark.rows <= reaches for mark in lost):
        return known
    return [*known, (_NO_NOISE.model_dump(), 1)]
