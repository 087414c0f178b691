"""Find the run or the site to watch, and compute the state of a site from its journal and its ledger.

At a site, nothing of it is sent anywhere, and the ledger is read and never written. A path to watch is a run
folder, a folder of run folders (its newest run, determined anew at every call), a coordinator's kit (the
newest of its runs), a site's kit, or a site's data folder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from client.ledger.file import LEDGER_FILE
from client.ledger.state import LedgerState
from client.site import JOURNAL_FILE, SITE_FILE, SiteConfig
from common.errors import FedbagsError, UserError
from common.files import JsonLinesFile
from common.run_records import Cause, cause_of_code
from deploy.consortium.kit import KIT_FILE, SiteKit, read_kit
from deploy.runs.reading import PhaseTimes, RunSource, newest_run
from server.run_folder import RunFolder


@dataclass(frozen=True)
class _Spending:
    """Hold the spending that the site's ledger records."""

    epsilon: float
    """Spent over all runs, for the ledger's unit, replace-one, at ``delta``."""
    delta: float
    left: float
    """Epsilon that the cap leaves."""
    cap: float
    unconfirmed: int
    """Reservations that no finished round followed: they count as spent."""
    refusals: int
    """Requests that the cap did not allow, over all runs."""
    own_share: float | None = None
    """Epsilon by the site's own shares of noise alone; None where no noise was shared."""


@dataclass(frozen=True)
class SiteState:
    """Hold the state of a site after some lines of its journal."""

    site: str = ""
    run: int = 0
    """The number of the last run; 0 for none."""
    round: int = 0
    """Round of the last message that named one."""
    messages: int = 0
    phases: Mapping[str, PhaseTimes] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    refusals: Mapping[Cause, int] = field(default_factory=dict)
    """Number of errors that went out, by cause."""
    last: float = 0.0
    """When the last message was answered, seconds since 1970; 0 for never."""
    spending: _Spending | None = None
    """None where there is no ledger yet, or none that can be read."""
    ledger_fault: str = ""
    """Why the ledger cannot be read; empty where it can, or there is none."""

    def after(self, done: Mapping[str, Any]) -> Self:
        """Return the state after one more line of the journal (``client.door._Done``)."""
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
            phases={**self.phases, phase: self.phases.get(phase, PhaseTimes()).plus(float(done["seconds"]))},
            bytes_sent=self.bytes_sent + int(done["bytes_sent"]),
            bytes_received=self.bytes_received + int(done["bytes_received"]),
            refusals=refusals,
            last=float(done["time"]),
        )


def _fold_journal(lines: Iterable[Mapping[str, Any]], start: SiteState) -> SiteState:
    """Return the state after all of the lines."""
    state = start
    for done in lines:
        state = state.after(done)
    return state


class _LedgerReader:
    """Read a ledger's spending, and compute it again when the file has changed or could not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._found: tuple[_Spending | None, str] = (None, "")

    def read(self) -> tuple[_Spending | None, str]:
        """Return the spending, or None and the reason why it is unknown.

        The reason is empty where there is no ledger.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None, ""
        # Reading and composing a long ledger takes time, and every call of refresh() asks for it.
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp or self._found[1]:
            self._found, self._stamp = self._read(), stamp
        return self._found

    def _read(self) -> tuple[_Spending | None, str]:
        try:
            state = LedgerState.read(self.path)
        # Shown and exported instead of raised, because a ledger that cannot be trusted must be noticed.
        except FedbagsError as error:
            return None, str(error)
        spent, cap = state.spent(), state.cap
        return _Spending(
            epsilon=spent,
            delta=cap.delta,
            left=max(cap.epsilon - spent, 0.0),
            cap=cap.epsilon,
            unconfirmed=len(state.open_reservations),
            refusals=state.refusals,
            own_share=state.spent_alone(),
        ), ""


class SiteSource:
    """Keep the state of a site, at the site, brought up to date at every call of refresh."""

    def __init__(self, site: str, journal: Path, ledger: Path) -> None:
        self._journal, self._ledger = JsonLinesFile(journal), _LedgerReader(ledger)
        self._empty = SiteState(site=site)
        self._state = self._empty

    def refresh(self) -> SiteState:
        """Return the state now."""
        news = self._journal.poll()
        self._state = _fold_journal(news.lines, self._empty if news.restarted else self._state)
        spending, fault = self._ledger.read()
        return replace(self._state, spending=spending, ledger_fault=fault)


def source(path: Path) -> RunSource | SiteSource:
    """Return the run or the site to watch at ``path``.

    Raises:
        UserError: nothing that can be watched is there; or a kit that cannot be read.
    """
    if (path / KIT_FILE).is_file():
        kit = read_kit(path)
        if isinstance(kit, SiteKit):
            return SiteSource(kit.site, kit.logs / JOURNAL_FILE, kit.data / LEDGER_FILE)
        return RunSource(kit.runs, newest=True)
    if RunFolder(path).config.is_file():
        return RunSource(path)
    if (path / SITE_FILE).is_file():
        return SiteSource(SiteConfig.load(path).name, path / JOURNAL_FILE, path / LEDGER_FILE)
    if newest_run(path) is not None:
        return RunSource(path, newest=True)
    raise UserError(
        f"nothing to watch in {path}\nGive a run folder (such as runs/demo), a folder of them, a kit that "
        "`fedbags provision` wrote, or a site's data folder."
    )
