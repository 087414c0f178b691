"""Enforce a site's privacy budget and record durably what is spent of it.

Reserve -> train -> confirm. A reservation is on the disk before the first gradient, and counts as spent
for ever: a crash wastes budget and never hides spending. The cap is the site's own (site.toml); nothing
that a server sends can raise it. One ledger holds for all runs and data versions on the site's disk
(see ``client.ledger.state``), and several processes may use it at once.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Self

from client.ledger.anchor import ADVICE, AnchorFile, CarryFile, LedgerLostError, anchor_file, lost_marks
from client.ledger.file import (
    Kind,
    LedgerBusyError,
    LedgerError,
    Mark,
    create,
    hash_of,
    read_entries,
    writing,
)
from client.ledger.file import append as append_row
from client.ledger.state import Cap, LedgerState, Reservation, copies_of
from common.errors import BudgetRefused, ConfigError, DataError, RunError, require_file
from common.privacy.accounting import fits, spent
from common.privacy.events import UNIT, Adjacency, DiscreteLaplace, PoissonGaussian, alone, is_shared
from common.privacy.proportions import CountRelease
from common.privacy.randomness import Generator
from common.records import PrivacyStatement

_CARRY_EVERY = 256
"""Rows after which the state is carried forward in a row of its own: what a new process reads at most."""
_IDENTIFIER_BYTES = 32
_LEAST_EVENT = DiscreteLaplace(scale=1e6)
"""Costs next to nothing: what does not fit beside it leaves no room for any training."""


class DataVersionError(DataError):
    """Report that the ledger does not know the data version and that nobody accepted it."""


@dataclass(frozen=True)
class Opening:
    """Say whose ledger is opened, for which data, and under which cap.

    Attributes:
        site: the site's name.
        data_version: ``BagStore.data_version``. One that the ledger has not seen must have been accepted
            (``Ledger.accept_version``), and is no new budget: all that was ever spent counts.
        cap_epsilon: the most that may ever be spent, replace-one of a bag.
        cap_delta: the delta of the cap and of every figure.
        cap_alone: the most that may ever be spent by the site's own shares of noise alone; None: no cap.
    """

    site: str
    data_version: str
    cap_epsilon: float
    cap_delta: float
    cap_alone: float | None = None

    def body(self) -> dict[str, Any]:
        """Return the content of the row that records it."""
        own = {} if self.cap_alone is None else {"cap_alone": float(self.cap_alone)}
        return {
            **own,
            "site": self.site,
            "unit": UNIT,
            "data_version": self.data_version,
            "cap_epsilon": float(self.cap_epsilon),
            "cap_delta": float(self.cap_delta),
        }


class Ledger:
    """Read and extend one site's ledger for one data version.

    No file stays open between calls. Other processes may write to the ledger at the same time.
    """

    def __init__(
        self, path: Path, data_version: str, anchor: AnchorFile | None = None, seen: Sequence[Mark] = ()
    ) -> None:
        self.path, self.data_version, self._state = path, data_version, LedgerState()
        self.anchor, self.seen = anchor or anchor_file(path), tuple(seen)
        self._carry = CarryFile(path)

    @classmethod
    def open(
        cls, path: Path, opening: Opening, *, anchor: AnchorFile | None = None, seen: Sequence[Mark] = ()
    ) -> Self:
        """Open the ledger of a site, or make it where there is none.

        A new cap or another accepted data version is recorded as a row.

        Args:
            path: the file; its folder must exist.
            opening: whose, for which data, and under which cap.
            anchor: its anchor; the one in the ledger's folder if None.
            seen: other witnesses of the chain, such as the site's journal.

        Raises:
            ConfigError: the cap is out of range, or below what is spent already.
            DataVersionError: the data version was not accepted.
            LedgerLostError: the file is missing, or lost rows that the anchor or a witness names.
            LedgerError: the file belongs to another site, or cannot be trusted.
            LedgerBusyError: the file cannot be written.
        """
        site, data_version = opening.site, opening.data_version
        cap_epsilon, cap_delta = opening.cap_epsilon, opening.cap_delta
        if not (0 < cap_epsilon < float("inf") and 0 < cap_delta < 1):
            raise ConfigError(
                f"a privacy budget of epsilon = {cap_epsilon:g} at delta = {cap_delta:g} cannot be kept: "
                "epsilon must be above 0 and finite, delta between 0 and 1"
            )
        ledger = cls(path, data_version, anchor, seen)
        marks = ledger._marks()
        # The marks were read first: a process that wrote one had made the file before, so a missing file
        # next to a mark is a lost ledger and not one that another process is about to make.
        if not path.exists():
            if marks:
                raise LedgerLostError(f"the privacy ledger {path} of site {site!r} is missing\n{ADVICE}")
            create(path, {**opening.body(), "identifier": new_identifier(), "time": now()})
        with ledger.transaction() as db:
            state = ledger._state
            if state.site != site:
                raise LedgerError(
                    f"the ledger {path} is of site {state.site!r}, not of {site!r}; every site keeps its own"
                )
            if data_version not in state.versions:
                raise _not_accepted(path, state, data_version)
            cap = Cap(cap_epsilon, cap_delta, opening.cap_alone)
            known = (state.data_version, state.cap) == (data_version, cap)
            # A ledger of an earlier release has no identifiers, and no salt in its newest row.
            if not known or data_version not in state.identifiers:
                for events, most, of in _accounts(state.merged, cap):
                    if (so_far := spent(events, cap_delta, Adjacency.REPLACE_ONE)) > most:
                        raise ConfigError(
                            f"site {site!r} has spent epsilon {so_far:.4g}{of} at delta {cap_delta:g} "
                            f"already, more than a cap of {most:g}: it cannot take part in private training "
                            "any more"
                        )
                name = state.identifiers.get(data_version) or new_identifier()
                ledger.append(db, Kind.OPENED, {**opening.body(), "identifier": name})
        return ledger

    @staticmethod
    def accept_version(path: Path, site: str, data_version: str, *, anchor: AnchorFile | None = None) -> bool:
        """Record that the site's owner accepts a new data version as the same site's data.

        Returns:
            False when the ledger knew the version already; nothing is written then.

        Raises:
            UserError: there is no such file.
            LedgerError: the file belongs to another site, or cannot be trusted.
            LedgerBusyError: the file cannot be written.
        """
        require_file(path, "the privacy ledger", "A site writes it when it first trains with a budget.")
        ledger = Ledger(path, data_version, anchor)
        with ledger.transaction() as db:
            if ledger._state.site != site:
                raise LedgerError(f"the ledger {path} is of site {ledger._state.site!r}, not of {site!r}")
            if data_version in ledger._state.versions:
                return False
            ledger.append(db, Kind.ACCEPTED, {"identifier": new_identifier()})
        return True

    @property
    def identifier(self) -> str:
        """Return the random name under which this data version may leave the site.

        It is drawn at random, so that nothing of the data can be found from it.
        """
        return self._state.identifiers[self.data_version]

    @property
    def state(self) -> LedgerState:
        """Return the ledger state as of the last call."""
        return self._state

    def refuse_used_up(self, run_id: str, round: int) -> None:
        """Refuse when nothing is left of the cap, before the costly search for a privacy plan.

        The refusal is a row like any other. Nobody knows yet what would have been asked for, so the row names
        the least event that there is.

        Raises:
            BudgetRefused: all of the cap is spent.
        """
        with self.transaction():
            state = self._state
            # The least that can be asked for costs something: nothing fits where nothing is left.
            least = (*state.merged, _LEAST_EVENT)
            if all(
                fits(events, most, state.cap.delta, Adjacency.REPLACE_ONE)
                for events, most, _ in _accounts(least, state.cap)
            ):
                return
        self._note_refusal(_LEAST_EVENT, {"run_id": run_id, "round": round})
        raise BudgetRefused(state.site, 0.0, 0.0, state.cap.epsilon)

    def reserve(
        self,
        event: PoissonGaussian | DiscreteLaplace,
        run_id: str,
        round: int,
        *,
        copies: int = 1,
        generator: Generator = Generator.UNKNOWN,
    ) -> Reservation:
        """Charge an event to the budget before it happens.

        On return the event is on the disk, with all its copies or none.

        Args:
            event: what will happen.
            run_id: the run that it is for.
            round: the round of the run.
            copies: how often it will happen.
            generator: what its sampling and noise will be drawn from.

        Raises:
            BudgetRefused: with it, the site would have spent more than its cap; nothing is charged.
            LedgerBusyError: it could not be recorded, so it must not happen.
        """
        body = {
            "event": event.model_dump(),
            "run_id": run_id,
            "round": round,
            "copies": copies,
            "generator": generator.value,
        }
        return Reservation(self._charge(Kind.RESERVED, event, body), event, run_id, round, copies)

    def confirm(self, reservation: Reservation) -> None:
        """Record that the round of a reservation was finished.

        What is spent does not change.

        Raises:
            RunError: there is no such reservation, or it was confirmed before.
        """
        with self.transaction() as db:
            if reservation.row not in self._state.open_reservations:
                raise RunError(f"row {reservation.row} of the ledger is no open reservation")
            self.append(db, Kind.CONFIRMED, {"reservation": reservation.row})

    def release_for(self, data_version: str) -> CountRelease | None:
        """Return the stored noised counts of a data version, or None if none were released yet.

        Whoever gets counts sends these again and draws no new noise.
        """
        with self.transaction():
            return self._state.releases.get(data_version)

    def store_release(
        self, release: CountRelease, run_id: str, *, generator: Generator = Generator.UNKNOWN
    ) -> CountRelease:
        """Charge a release of label counts and store its counts in the same row.

        One row holds both, so that both are on the disk or neither. If another process released this data
        version meanwhile, its counts are returned, and the ones given here must be forgotten.

        Args:
            release: the noised counts.
            run_id: the run that they were drawn for.
            generator: what their noise was drawn from.

        Returns:
            The counts to send.

        Raises:
            BudgetRefused: the cap does not allow it; the counts must be forgotten.
            LedgerBusyError: it could not be recorded, so it must not be sent.
        """
        body = {"release": release.model_dump(mode="json"), "run_id": run_id, "generator": generator.value}
        self._charge(Kind.RELEASED, release.event, body)
        return self._state.releases[self.data_version]

    def statement(self, round: int) -> PrivacyStatement:
        """Return the privacy statement of the site after a round, as ``LedgerState.statement`` makes it."""
        with self.transaction():
            return self._state.statement(round)

    def events(self) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
        """Return all events so far in the order of their rows, including reserved ones."""
        with self.transaction():
            return tuple(self._state.events)

    def export(self) -> dict[str, Any]:
        """Return the spending in the form that another accountant can check (``LedgerState.export``)."""
        with self.transaction():
            return self._state.export()

    def _charge(self, kind: Kind, event: PoissonGaussian | DiscreteLaplace, body: dict[str, Any]) -> int:
        with self.transaction() as db:
            state = self._state
            # A second draw of the noise for the same counts would cost the budget twice, so the first one
            # stays. This is checked under the file's lock, which another process may have held since the
            # caller looked.
            if kind is Kind.RELEASED and self.data_version in state.releases:
                return 0
            # The decision is made on all events together: epsilons of single events do not add up to that
            # of their composition.
            asked, cap = (*state.merged, *[event] * copies_of(body)), state.cap
            over = [
                (events, most, of)
                for events, most, of in _accounts(asked, cap)
                if not fits(events, most, cap.delta, Adjacency.REPLACE_ONE)
            ]
            if not over:
                return self.append(db, kind, body)
        events, most, of = over[0]
        so_far = (state.spent_alone() or 0.0) if of else state.spent()
        after = spent(events, cap.delta, Adjacency.REPLACE_ONE)
        refusal = BudgetRefused(state.site, after - so_far, max(most - so_far, 0.0), most)
        self._note_refusal(event, body)
        raise refusal

    def _note_refusal(self, event: PoissonGaussian | DiscreteLaplace, body: Mapping[str, Any]) -> None:
        """Record a refused event, unless the ledger cannot be written."""
        asked_for = {
            "event": event.model_dump(),
            "run_id": body["run_id"],
            "round": body.get("round", 0),
            "copies": copies_of(body),
        }
        # On a full disk the refusal stands all the same: it spends nothing, so it need not be on record.
        with suppress(LedgerBusyError), self.transaction() as db:
            self.append(db, Kind.REFUSED, asked_for)

    @contextmanager
    def transaction(self, *, checked: bool = True) -> Iterator[Connection]:
        """Hold the ledger file alone, with the ledger state brought up to date, for the length of a block.

        At the end of the block the rows are on the disk, and then the anchor that names them.

        Args:
            checked: refuse a ledger that lost rows; off only while such a loss is being accepted.
        """
        known = self._state.rows
        try:
            with writing(self.path) as db:
                self._read(db)
                if checked:
                    self._refuse_lost(db)
                self._carry.recall(self._state, lambda seq: hash_of(db, seq))
                yield db
                # Without these rows, a process that answers a single message would read all of a long
                # ledger first.
                if self._state.rows - self._state.carried_at >= _CARRY_EVERY:
                    self.append(db, Kind.CARRIED, {"state": self._state.as_json()})
        except BaseException:
            # Rows of a transaction that was undone must not stay in memory; the next one reads anew.
            if self._state.rows != known:
                self._state = LedgerState()
            raise
        # Only after the commit: an anchor ahead of its ledger would name rows that do not exist, and the
        # site would refuse its own sound ledger after a crash.
        self.anchor.advance(self._state)
        self._carry.keep(self._state)

    def _read(self, db: Connection) -> None:
        """Read the rows that are new since the last call.

        A fresh process begins at the newest row that carries the state of all rows before it.
        """
        if self._state.last is None:
            self._state = LedgerState.begun(db, self.path)
        for entry in read_entries(db, self.path, self._state.last):
            self._state.add(entry)

    def _marks(self) -> tuple[Mark, ...]:
        anchored = self.anchor.read()
        return (*(() if anchored is None else (anchored.mark,)), *self.seen)

    def _refuse_lost(self, db: Connection) -> None:
        lost = lost_marks(self._marks(), self._state, lambda seq: hash_of(db, seq))
        if lost:
            rows = max(mark.rows for mark in lost)
            raise LedgerLostError(
                f"the privacy ledger {self.path} holds {self._state.rows} row(s) and not the row {rows} that "
                f"the site once wrote: it is an older copy, or another ledger\n{ADVICE}"
            )

    def append(self, db: Connection, kind: Kind, body: dict[str, Any]) -> int:
        """Add one row within a transaction, update the ledger state, and return the row's number."""
        entry = append_row(
            db, self._state.last, kind, {**body, "data_version": self.data_version, "time": now()}
        )
        self._state.add(entry)
        return entry.seq


def _accounts(
    events: Sequence[PoissonGaussian | DiscreteLaplace], cap: Cap
) -> Iterator[tuple[tuple[PoissonGaussian | DiscreteLaplace, ...], float, str]]:
    """Yield what is held against each cap: the events, the cap, and words for an error."""
    yield tuple(events), cap.epsilon, ""
    if cap.alone is not None and is_shared(events):
        yield alone(events), cap.alone, " by its own shares of noise alone"


def _not_accepted(path: Path, state: LedgerState, data_version: str) -> DataVersionError:
    known = "\n".join(f"  {version} since {since}" for version, since in state.versions.items())
    return DataVersionError(
        f"the data of site {state.site!r} is of version\n  {data_version}\n"
        f"which its privacy ledger {path} has never seen. It holds what was spent on\n{known}",
        advice="If the wrong folder or ledger was given, give the right one. If this is the same site's "
        "data, changed or copied on purpose, accept it once: "
        "`fedbags ledger accept-version SITE_FOLDER [--kit KIT]`. What was "
        "spent keeps counting then: the same patients may be in both versions.",
    )


def new_identifier() -> str:
    """Return a random name for a version of the site's data, which tells nothing of it."""
    return secrets.token_hex(_IDENTIFIER_BYTES)


def now() -> str:
    """Return the time in UTC, in whole seconds, as a row of the ledger has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
