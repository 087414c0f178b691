"""What the rows of a ledger mean: what was spent, by which run, under which cap. Reads entries only.

Everything on the site's disk composes into one figure, over runs and over data versions. A new data
version is a changed folder, and mostly the same patients: counting it as new people would let an edited
row renew the budget. So all events count, for ever, and reservations count from the moment they are
made, confirmed or not. A version that the site's owner has not accepted is no version of this book.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from client.ledger_file import Entry, Kind, LedgerError, read_entries, reading
from common.errors import require_file
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, Unit, event_from_dict, merge
from common.privacy.proportions import CountRelease
from common.privacy.randomness import Generator


def copies_of(body: Mapping[str, Any]) -> int:
    """How many equal events a reserved or refused row is for: one, or one a level for a look."""
    copies = int(body.get("copies", 1))
    if copies < 1:
        raise ValueError("a row is for at least one event")
    return copies


@dataclass(frozen=True)
class Cap:
    """The most that may ever be spent: epsilon at delta, replace-one of the ledger's unit."""

    epsilon: float
    delta: float


@dataclass
class Book:
    """The meaning of a ledger's rows, brought forward row by row with ``add``."""

    site: str = ""
    unit: Unit = Unit.BAG
    data_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Every data version that was trained on or accepted, with the time of its first row."""
    cap: Cap = field(default_factory=lambda: Cap(0.0, 0.5))
    entries: list[Entry] = field(default_factory=list)
    events: list[PoissonGaussian | DiscreteLaplace] = field(default_factory=list)
    """In the order of their rows, scaled to ``unit``; reserved ones included."""
    releases: dict[str, CountRelease] = field(default_factory=dict)
    """By data version."""
    open_reservations: set[int] = field(default_factory=set)
    """Rows that were reserved and never confirmed; they count."""
    generators: tuple[Generator, ...] = ()
    """Every generator that the charged events drew from, in the order of first use."""
    refusals: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a ledger file without changing it.

        Raises:
            UserError: there is no such file.
            LedgerError: it is damaged, tampered with, or no ledger.
        """
        require_file(path, "the privacy ledger", "A site writes it when it first trains with a budget.")
        with reading(path) as db:
            return cls.of(read_entries(db, path))

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """The book of these rows."""
        book = cls()
        for entry in entries:
            book.add(entry)
        return book

    @property
    def last(self) -> Entry | None:
        """The newest row."""
        return self.entries[-1] if self.entries else None

    @property
    def head(self) -> str:
        """The hash of the newest row, which stands for the whole ledger."""
        return self.entries[-1].hash if self.entries else ""

    def add(self, entry: Entry) -> None:
        """Take in one more row.

        Raises:
            LedgerError: the row says something that no ledger says.
        """
        try:
            self._take(entry)
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            reason = f"{entry.kind!r} with unusable content ({type(error).__name__})"
            raise LedgerError(f"row {entry.seq} of the ledger: {reason}") from error
        self.entries.append(entry)

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match Kind(entry.kind):
            case Kind.OPENED:
                site, unit = str(body["site"]), Unit(body["unit"])
                if self.entries and (site, unit) != (self.site, self.unit):
                    raise ValueError("site and unit never change")
                self.site, self.unit, self.data_version = site, unit, str(body["data_version"])
                self.cap = Cap(float(body["cap_epsilon"]), float(body["cap_delta"]))
                self.versions.setdefault(self.data_version, str(body["time"]))
            case Kind.ACCEPTED:
                self.versions.setdefault(str(body["data_version"]), str(body["time"]))
            case Kind.RESERVED:
                self.events += [event_from_dict(body["event"])] * copies_of(body)
                self._drew_from(body)
                self.open_reservations.add(entry.seq)
            case Kind.CONFIRMED:
                self.open_reservations.remove(int(body["reservation"]))
            case Kind.RELEASED:
                release = CountRelease.model_validate_json(json.dumps(body["release"]))
                self.events.append(release.event(self.unit))
                self.releases[str(body["data_version"])] = release
                self._drew_from(body)
            case Kind.REFUSED:
                self.refusals += 1

    def _drew_from(self, body: Mapping[str, Any]) -> None:
        generator = Generator.read(str(body.get("generator", "")))
        if generator not in self.generators:
            self.generators = (*self.generators, generator)

    def spent(self, adjacency: Adjacency = Adjacency.REPLACE_ONE) -> float:
        """Epsilon of all events for the ledger's unit at the cap's delta (dp-accounting PLD)."""
        return spent(self.events, self.cap.delta, adjacency)

    def events_for(self, unit: Unit) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
        """All events, merged, with the releases of counts scaled to ``unit``.

        Steps and looks are bounded per bag in any case.
        """
        if unit is self.unit:
            return merge(self.events)
        events: list[PoissonGaussian | DiscreteLaplace] = []
        for entry in self.entries:
            if entry.kind == Kind.RELEASED:
                release = CountRelease.model_validate_json(json.dumps(entry.body["release"]))
                events.append(release.event(unit))
            elif entry.kind == Kind.RESERVED:
                events += [event_from_dict(entry.body["event"])] * copies_of(entry.body)
        return merge(events)

    def export(self) -> dict[str, Any]:
        """All that it takes to recompute ``spent`` with another accountant.

        Noise multipliers are relative to the clip norm of one bag. A release's scale is relative to the
        images that the unit named in ``unit`` can move, so that it costs two mechanisms of sensitivity 1
        and this scale under replace-one, and one under add/remove. Equal events are added up.
        """
        return {
            "site": self.site,
            "data_version": self.data_version,
            "unit": self.unit.explanation,
            "cap": {"epsilon": self.cap.epsilon, "delta": self.cap.delta},
            "events": [event.model_dump() for event in merge(self.events)],
            "spent": {
                "delta": self.cap.delta,
                "replace_one": self.spent(Adjacency.REPLACE_ONE),
                "add_remove": self.spent(Adjacency.ADD_REMOVE),
            },
            "head": self.head,
        }
