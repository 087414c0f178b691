"""Compute the state of one site, at the site, from its journal and its ledger.

Nothing of it is sent anywhere. The ledger is read and never written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from common.errors import FedbagsError
from common.messages import SiteError
from deploy.watch.state import LOST, OTHER, Phase, site_cause


@dataclass(frozen=True)
class Spending:
    """Hold the spending that the site's ledger records."""

    epsilon: float
    """Spent over all runs, for the ledger's unit, replace-one, at ``delta``."""
    delta: float
    left: float
    """What the cap leaves of epsilon."""
    cap: float
    unconfirmed: int
    """Reservations that no finished round followed: they count as spent."""
    refusals: int
    """Requests that the cap did not allow, over all runs."""


@dataclass(frozen=True)
class SiteState:
    """Hold the state of a site after some lines of its journal."""

    site: str = ""
    run: int = 0
    """The number of the last run; 0 for none."""
    round: int = 0
    """Of the last message that had one."""
    messages: int = 0
    phases: Mapping[str, Phase] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Errors that went out, by cause (``deploy.watch.state.CAUSES``)."""
    last: float = 0.0
    """When the last message was answered, seconds since 1970; 0 for never."""
    spending: Spending | None = None
    """None where there is no ledger yet, or none that can be read."""
    ledger_fault: str = ""
    """Why the ledger cannot be read; empty where it can, or there is none."""

    def after(self, done: Mapping[str, Any]) -> Self:
        """Return the state after one more line of the journal (``client.journal.Done``)."""
        phase, code = str(done["phase"]), int(done["code"])
        refusals = dict(self.refusals)
        if code:
            cause = cause_of_code(code)
            refusals[cause] = refusals.get(cause, 0) + 1
        return replace(
            self,
            run=int(done["run"]),
            round=int(done["round"]) or (self.round if done["run"] == self.run else 0),
            messages=self.messages + 1,
            phases={**self.phases, phase: self.phases.get(phase, Phase()).plus(float(done["seconds"]))},
            bytes_sent=self.bytes_sent + int(done["bytes_sent"]),
            bytes_received=self.bytes_received + int(done["bytes_received"]),
            refusals=refusals,
            last=float(done["time"]),
        )


def cause_of_code(code: int) -> str:
    """Return the cause, one of CAUSES, for an error code that was sent."""
    if code in set(SiteError):
        return site_cause(SiteError(code))
    # Codes below those of SiteError are Flower's own, for a message or an app that was lost.
    return LOST if code < min(SiteError) else OTHER


def fold_journal(lines: Iterable[Mapping[str, Any]], start: SiteState) -> SiteState:
    """Return the state after all of the lines."""
    state = start
    for done in lines:
        state = state.after(done)
    return state


class LedgerReader:
    """Read a ledger's spending, and compute it again when the file has changed or could not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._found: tuple[Spending | None, str] = (None, "")

    def read(self) -> tuple[Spending | None, str]:
        """Return the spending, or None and the reason why it is unknown.

        The reason is empty where there is no ledger.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None, ""
        # Reading and composing a long ledger takes time, and every call of look() asks for it.
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp or self._found[1]:
            self._found, self._stamp = self._read(), stamp
        return self._found

    def _read(self) -> tuple[Spending | None, str]:
        from client.ledger_book import Book

        try:
            book = Book.read(self.path)
        # Shown and exported instead of raised, because a ledger that cannot be trusted must be noticed.
        except FedbagsError as error:
            return None, str(error)
        spent, cap = book.spent(), book.cap
        return Spending(
            epsilon=spent,
            delta=cap.delta,
            left=max(cap.epsilon - spent, 0.0),
            cap=cap.epsilon,
            unconfirmed=len(book.open_reservations),
            refusals=book.refusals,
        ), ""
