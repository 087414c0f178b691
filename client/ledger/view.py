"""Show the guard which charges a site's ledger recorded while one question was answered.

Reads the file by itself, so that the guard need not believe a handler, and never writes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from client.data.bags import BagStore
from client.ledger.file import Entry, Kind, newest_written, read_entries, reading
from client.release import private_release
from client.session import SiteSession
from common.config import RunConfig
from common.errors import EgressError, require_file
from common.records import PrivacyStatement, ProportionRelease

if TYPE_CHECKING:  # the accountants are loaded in private runs only
    from client.ledger.state import LedgerState, Reservation


@dataclass(frozen=True)
class Charges:
    """Hold the ledger of a private run and its length before a question was answered."""

    path: Path | None
    """None in a run without privacy, which has no ledger."""
    run_name: str
    rows: int

    @classmethod
    def before(cls, session: SiteSession) -> Self:
        """Return the view of the ledger as it is before the question is answered."""
        if not session.private:
            return cls(None, "", 0)
        path, rows = session.ledger_path, 0
        if path.is_file():
            with reading(path) as db:
                rows = newest_written(db)
        return cls(path, session.run_name, rows)

    def paid_for_training(self, round: int, config: RunConfig) -> bool:
        """Return whether the round's private steps were reserved while this question was answered."""
        return any(
            # Exactly this round's event: a cheaper reservation, of fewer steps or for an evaluation, must not
            # pass for it.
            found.event.kind == "poisson_gaussian"
            and found.event.steps == config.dp.steps_per_round
            and found.event.shares == config.shares
            and found.copies == 1
            for found in self._reservations(round)
        )

    def paid_for_evaluation(self, round: int, config: RunConfig, levels: int) -> bool:
        """Return whether a noised evaluation of all levels was reserved while this question was answered."""
        return any(
            found.event.kind == "discrete_laplace"
            and found.event.scale == config.dp.metrics_scale
            and found.copies == levels
            for found in self._reservations(round)
        )

    def statement(self, round: int, head: str) -> PrivacyStatement:
        """Return the privacy statement of the ledger after a round, as of the row that a reply names.

        Other runs may write while this one's question is answered, so it need not be the newest row.

        Args:
            round: of the question.
            head: the row's hash.

        Raises:
            EgressError: there is no such row, or it is older than the question or than what paid for it.
        """
        state = self._state_at(head)
        paid = [found.row for found in self._reservations(round)]
        # An older row would let a handler send a statement from before the charge, which understates the
        # spending.
        if state.head != head or state.rows < min(paid, default=max(self.rows, 1)):
            raise EgressError("the privacy statement is of no row that was written for this question")
        return state.statement(round)

    def release(self, store: BagStore) -> ProportionRelease:
        """Return the noised release of the data version that the ledger keeps.

        Raises:
            EgressError: the ledger keeps none.
        """
        state = self._state_at()
        kept, name = state.releases.get(store.data_version), state.identifiers.get(store.data_version)
        if kept is None or name is None:
            raise EgressError("noised counts that the ledger has not paid for")
        return private_release(store, kept, name)

    def _reservations(self, round: int) -> "list[Reservation]":
        """Return the reservations for this run and round since the question came, ignoring other runs."""
        here = (self.run_name, round)
        return [found for found in self._read[2] if (found.run_id, found.round) == here]

    @cached_property
    def _read(self) -> "tuple[LedgerState, tuple[Entry, ...], tuple[Reservation, ...]]":
        """Return the newest state carried before the question, all later rows, and what they reserve.

        Read once, when the answer is there.
        """
        # Imported here: the accountants take seconds, and a run without privacy needs none.
        from client.ledger.state import LedgerState, Reservation

        if self.path is None:
            raise EgressError("a run without privacy has no ledger")
        require_file(self.path, "the privacy ledger", "A site writes it when it first trains with a budget.")
        with reading(self.path) as db:
            state = LedgerState.begun(db, self.path, self.rows)
            entries = tuple(read_entries(db, self.path, state.last))
        # Older reservations were for older replies. If they counted, one charge could pay for two updates.
        since = (entry for entry in entries if entry.seq > self.rows and entry.kind == Kind.RESERVED)
        return state, entries, tuple(map(Reservation.of, since))

    def _state_at(self, head: str | None = None) -> "LedgerState":
        """Return the state as of the row with this hash, or of the newest row if ``head`` is None.

        Where no row has the hash, the state goes on to the newest row. It goes forward from call to call, so
        that a caller who wants several states asks for the oldest first.
        """
        state, entries, _ = self._read
        for entry in entries:
            if state.head == head:
                break
            if entry.seq > state.rows:
                state.add(entry)
        return state
