"""What the guard sees of a site's ledger: what was charged while one question was answered.

Reads the file by itself, whatever a handler says of it, and never writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from flwr.app import Context

from client.bags import BagStore
from client.release import private_release
from client.site import SiteConfig
from common.config import RunConfig
from common.errors import EgressError
from common.messages import PrivacyStatement, ProportionRelease

if TYPE_CHECKING:  # the accountants are loaded in private runs only
    from client.ledger_book import Book, NewestReservation


@dataclass(frozen=True)
class Charges:
    """The ledger of a private run, and how long it was before a question was answered."""

    path: Path | None
    """None in a run without privacy, which has no ledger."""
    run_name: str
    rows: int

    @classmethod
    def before(cls, context: Context, config: RunConfig, site: SiteConfig, folder: Path) -> Self:
        """Return the view as of now, before the question is answered."""
        if not config.dp.epsilon:
            return cls(None, "", 0)
        from client.budget import ledger_path, run_name
        from client.ledger_file import newest_written, reading

        path, rows = ledger_path(context, config, folder, site.policy.budget), 0
        if path.is_file():
            with reading(path) as db:
                rows = newest_written(db)
        return cls(path, run_name(context, config), rows)

    def paid_for_training(self, round: int, config: RunConfig) -> bool:
        """Return whether this question's own reservation is of the round's private steps."""
        found = self._reservation(round)
        if found is None or found.event.kind != "poisson_gaussian":
            return False
        return found.copies == 1 and found.event.steps == config.dp.steps_per_round

    def paid_for_look(self, round: int, config: RunConfig, levels: int) -> bool:
        """Return whether this question's own reservation is of a look at every level, at the run's scale."""
        found = self._reservation(round)
        if found is None or found.event.kind != "discrete_laplace":
            return False
        return found.copies == levels and found.event.scale == config.dp.metrics_scale

    def statement(self, round: int) -> PrivacyStatement:
        """Return what the ledger states after a round."""
        return self._book().statement(round)

    def release(self, store: BagStore) -> ProportionRelease:
        """Return the noised release of the data version, as the ledger keeps it.

        Raises:
            EgressError: the ledger keeps none.
        """
        book = self._book()
        kept, name = book.releases.get(store.data_version), book.identifiers.get(store.data_version)
        if kept is None or name is None:
            raise EgressError("noised counts that the ledger has not paid for")
        return private_release(store, kept, name)

    def _reservation(self, round: int) -> "NewestReservation | None":
        newest = self._book().newest
        if newest is None or newest.row <= self.rows:
            return None
        return newest if (newest.run_id, newest.round) == (self.run_name, round) else None

    def _book(self) -> "Book":
        from client.ledger_book import Book

        if self.path is None:
            raise EgressError("a run without privacy has no ledger")
        return Book.read(self.path)
