"""Interpret the rows of a ledger as a ledger state, with all spending, its runs and the cap.

Reads entries only. Everything on the site's disk composes into one figure, over runs and over data versions.
A new data version is a changed folder, and mostly the same patients: counting it as new people would let an
edited row renew the budget. So all events count, for ever, and reservations count from the moment they are
made, confirmed or not. A version that the site's owner has not accepted is not part of the state.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Self

from pydantic import ValidationError

from client.ledger.file import Entry, Kind, LedgerError, newest_of_kind, read_entries, read_entry, reading
from common.errors import require_file
from common.privacy.accounting import spent
from common.privacy.events import (
    UNIT,
    UNIT_EXPLANATION,
    Adjacency,
    DiscreteLaplace,
    PoissonGaussian,
    alone,
    event_from_dict,
    is_shared,
    merge,
)
from common.privacy.proportions import CountRelease
from common.privacy.randomness import Generator
from common.records import PrivacyStatement


def copies_of(body: Mapping[str, Any]) -> int:
    """Return the number of equal events that a reserved or refused row stands for.

    It is 1 for a round, and the number of levels for an evaluation on held-back bags.

    Raises:
        ValueError: the number is below 1.
    """
    copies = int(body.get("copies", 1))
    if copies < 1:
        raise ValueError("a row is for at least one event")
    return copies


Tally = list[tuple[dict[str, Any], int]]
"""Events as JSON, each with how often it follows upon itself."""


def tally(events: Iterable[PoissonGaussian | DiscreteLaplace]) -> Tally:
    """Return events in their order as JSON, with runs of equal events counted."""
    return [(event.model_dump(), sum(1 for _ in run)) for event, run in groupby(events)]


def _untally(runs: Iterable[Iterable[Any]]) -> list[PoissonGaussian | DiscreteLaplace]:
    """Return the events of a tally, as the inverse of ``tally``.

    Raises:
        ValueError: a number is below 1, or an event is none.
    """
    events: list[PoissonGaussian | DiscreteLaplace] = []
    for event, number in runs:
        if number < 1:
            raise ValueError("an event happened at least once")
        events += [event_from_dict(event)] * number
    return events


@dataclass(frozen=True)
class Cap:
    """Hold the most that may ever be spent, for replace-one of a bag."""

    epsilon: float
    delta: float
    alone: float | None = None
    """Of what the site's own shares of noise give without those of others; None: no cap on that."""

    def as_json(self) -> list[float]:
        """Return the cap for a row that carries a state forward."""
        return [self.epsilon, self.delta, *(() if self.alone is None else (self.alone,))]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """Return the cap that a row of kind ``opened`` states."""
        own = body.get("cap_alone")
        return cls(float(body["cap_epsilon"]), float(body["cap_delta"]), None if own is None else float(own))


@dataclass(frozen=True)
class Reservation:
    """Represent an event that is on the disk as spent.

    ``row`` names it in the ledger.
    """

    row: int
    event: PoissonGaussian | DiscreteLaplace
    run_id: str
    round: int
    copies: int

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Return the reservation that a row of kind ``reserved`` records."""
        body = entry.body
        event = event_from_dict(body["event"])
        return cls(entry.seq, event, str(body["run_id"]), int(body["round"]), copies_of(body))


@dataclass
class LedgerState:
    """Hold the ledger state, brought forward row by row with ``add``."""

    site: str = ""
    data_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Every data version that was trained on or accepted, with the time of its first row."""
    cap: Cap = field(default_factory=lambda: Cap(0.0, 0.5))
    entries: list[Entry] = field(default_factory=list)
    """The rows since the state was begun: all of them, unless it was carried forward (see ``carried``)."""
    rows: int = 0
    """Number of the newest row."""
    head: str = ""
    """The hash of the newest row, which stands for the whole ledger."""
    events: list[PoissonGaussian | DiscreteLaplace] = field(default_factory=list)
    """In the order of their rows; reserved ones included."""
    releases: dict[str, CountRelease] = field(default_factory=dict)
    """Noised releases by data version."""
    release_rows: dict[str, int] = field(default_factory=dict)
    identifiers: dict[str, str] = field(default_factory=dict)
    """By data version, the random name under which it may leave the site."""
    open_reservations: set[int] = field(default_factory=set)
    """Rows that were reserved and never confirmed; they count."""
    generators: tuple[Generator, ...] = ()
    """Every generator that the charged events drew from, in the order of first use."""
    refusals: int = 0
    losses: int = 0
    """How often the site's owner accepted that rows were lost."""
    lost: set[str] = field(default_factory=set)
    """Heads of the chains whose loss was accepted."""
    carried_at: int = 0
    """The newest row that carries the state forward."""
    _merged: tuple[int, tuple[PoissonGaussian | DiscreteLaplace, ...]] = field(
        default=(0, ()), compare=False, repr=False
    )
    """Of how many events ``merged`` made its last answer, and that answer."""
    _counts: Counter[PoissonGaussian | DiscreteLaplace] = field(default_factory=Counter, repr=False)
    """How often each of ``events`` happened: counted as they come, so that no row counts all of them anew."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the state of a ledger file without changing the file.

        Raises:
            UserError: there is no such file.
            LedgerError: it is damaged, tampered with, or no ledger.
        """
        require_file(path, "the privacy ledger", "A site writes it when it first trains with a budget.")
        with reading(path) as db:
            return cls.of(read_entries(db, path))

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """Return the state after these rows."""
        state = cls()
        for entry in entries:
            state.add(entry)
        return state

    @classmethod
    def begun(cls, db: Connection, path: Path, rows: int | None = None) -> Self:
        """Return the state at the newest row that carries one, or an empty state if no row does.

        Args:
            db: the ledger file.
            path: its name.
            rows: the last row that may be read; None for the newest.

        Raises:
            LedgerError: that row cannot be trusted.
        """
        newest = newest_of_kind(db, Kind.CARRIED, rows)
        if not newest:
            return cls()
        return cls.carried(read_entry(db, path, newest), lambda seq: read_entry(db, path, seq))

    @classmethod
    def carried(cls, entry: Entry, row: Callable[[int], Entry]) -> Self:
        """Return the state that a row of kind ``carried`` holds, without reading the rows before it.

        Args:
            entry: that row, part of a chain that was checked when it was written.
            row: reads one row; asked for the releases of counts only.

        Raises:
            LedgerError: the row says something that no ledger says.
        """
        state = cls()
        try:
            content = entry.body["state"]
            state.site = _site_of(content)
            state.data_version = str(content["data_version"])
            state.versions = {str(version): str(since) for version, since in content["versions"]}
            state.identifiers = {str(version): str(name) for version, name in content["identifiers"]}
            state.cap = Cap(*map(float, content["cap"]))
            state._spend(_untally(content["events"]))
            state.release_rows = {str(version): int(number) for version, number in content["releases"]}
            for version, number in state.release_rows.items():
                # The state names the row of a release only; its counts, maybe one row per bag, stay there.
                state.releases[version] = _release(row(number).body)
            state.open_reservations = set(map(int, content["open"]))
            state.generators = tuple(map(Generator, content["generators"]))
            state.refusals, state.losses = int(content["refusals"]), int(content["losses"])
            state.lost = set(map(str, content["lost"]))
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise _unusable(entry, error) from error
        state._end_with(entry)
        state.carried_at = entry.seq
        return state

    def as_json(self) -> dict[str, Any]:
        """Return all that later rows build on as JSON, which a row of kind ``carried`` holds."""
        return {
            "site": self.site,
            "unit": UNIT,
            "data_version": self.data_version,
            "versions": [[version, since] for version, since in self.versions.items()],
            "identifiers": [[version, name] for version, name in self.identifiers.items()],
            "cap": self.cap.as_json(),
            "events": [[event.model_dump(), number] for event, number in self._counts.items()],
            "releases": [[version, number] for version, number in self.release_rows.items()],
            "open": sorted(self.open_reservations),
            "generators": [generator.value for generator in self.generators],
            "refusals": self.refusals,
            "losses": self.losses,
            "lost": sorted(self.lost),
        }

    @property
    def last(self) -> Entry | None:
        """Return the newest row, or None before the first."""
        return self.entries[-1] if self.entries else None

    def add(self, entry: Entry) -> None:
        """Take one more row into the state.

        Raises:
            LedgerError: the row says something that no ledger says.
        """
        try:
            self._take(entry)
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise _unusable(entry, error) from error
        self._end_with(entry)

    def _end_with(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.rows, self.head = entry.seq, entry.hash

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match Kind(entry.kind):
            case Kind.OPENED:
                site = _site_of(body)
                if self.entries and site != self.site:
                    raise ValueError("the site never changes")
                self.site, self.data_version = site, str(body["data_version"])
                self.cap = Cap.of(body)
                self._know_version(body)
            case Kind.ACCEPTED:
                self._know_version(body)
            case Kind.RESERVED:
                reserved = Reservation.of(entry)
                self._spend([reserved.event] * reserved.copies)
                self._drew_from(body)
                self.open_reservations.add(entry.seq)
            case Kind.CONFIRMED:
                # Nothing is given back: a site that crashed after a gradient has spent as much as one
                # that finished.
                self.open_reservations.remove(int(body["reservation"]))
            case Kind.RELEASED:
                release, version = _release(body), str(body["data_version"])
                self._spend([release.event])
                self.releases[version], self.release_rows[version] = release, entry.seq
                self._drew_from(body)
            case Kind.REFUSED:
                self.refusals += 1
            case Kind.LOST:
                self._spend(_untally(body["events"]))
                self._drew_from(body)
                self.lost |= set(map(str, body["heads"]))
                self.losses += 1
            case Kind.CARRIED:
                # Whoever reads from the first row on checks each carried state against the rows. A state
                # that left spending out would hide it from all processes that begin there.
                if body["state"] != self.as_json():
                    raise ValueError("it carries forward something else than the rows before it say")
                self.carried_at = entry.seq

    def _spend(self, events: Sequence[PoissonGaussian | DiscreteLaplace]) -> None:
        self.events += events
        self._counts.update(events)

    def _know_version(self, body: Mapping[str, Any]) -> None:
        version = str(body["data_version"])
        # The first row stands: its name may have left the site already, and a second name would look like
        # other data.
        self.versions.setdefault(version, str(body["time"]))
        if "identifier" in body:
            self.identifiers.setdefault(version, str(body["identifier"]))

    def _drew_from(self, body: Mapping[str, Any]) -> None:
        # Rows of earlier releases do not name a generator; they are reported as unknown, not as secure.
        generator = Generator.read(str(body.get("generator", "")))
        if generator not in self.generators:
            self.generators = (*self.generators, generator)

    def spent(self, adjacency: Adjacency = Adjacency.REPLACE_ONE) -> float:
        """Return the epsilon of all events for a bag at the cap's delta (dp-accounting PLD).

        Of steps with shared noise it is the one against the server and the other sites under secure
        aggregation, which see nothing but a sum.
        """
        return spent(self.merged, self.cap.delta, adjacency)

    def spent_alone(self, adjacency: Adjacency = Adjacency.REPLACE_ONE) -> float | None:
        """Return the epsilon that the site's own shares of noise give, or None if no noise was shared.

        It holds even if the masks fail, or if all other sites work with the server.
        """
        if not is_shared(self.merged):
            return None
        return spent(merge(alone(self.merged)), self.cap.delta, adjacency)

    @property
    def merged(self) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
        """Return all events, with equal ones merged."""
        number, merged = self._merged
        if number < len(self.events):  # events are only ever added, and a long ledger has many
            merged = merge((*merged, *self.events[number:]))
            self._merged = len(self.events), merged
        return merged

    def statement(self, round: int) -> PrivacyStatement:
        """Return the privacy statement that the site sends to the server after a round.

        Its figures are for replace-one of a bag (PLD, at the cap's delta). ``budget_left`` is what the cap
        leaves.
        """
        epsilon, own = self.spent(), self.spent_alone()
        return PrivacyStatement(
            site=self.site,
            round=round,
            epsilon=epsilon if math.isfinite(epsilon) else None,
            epsilon_alone=own if own is not None and math.isfinite(own) else None,
            delta=self.cap.delta,
            events=tuple(event.model_dump() for event in self.merged),
            budget_left=max(self.cap.epsilon - epsilon, 0.0),
            ledger_head=self.head,
            generator="; ".join(self.generators),
            losses=self.losses,
        )

    def export(self) -> dict[str, Any]:
        """Return all that it takes to recompute ``spent`` with another accountant.

        Noise multipliers are relative to the clip norm of one bag. A release's scale is relative to the
        images that one bag can move, so that it costs two mechanisms of sensitivity 1 and this scale under
        replace-one, and one under add/remove. An event with ``shares`` counts on the noise of that many
        sites; by its own share alone its multiplier is sigma / sqrt(shares). Equal events are added up. The
        data version is the random name under which it leaves the site.
        """
        shared = {}
        if (own := self.spent_alone()) is not None:
            shared = {
                "spent_by_own_noise_alone": {
                    "delta": self.cap.delta,
                    "replace_one": own,
                    "add_remove": self.spent_alone(Adjacency.ADD_REMOVE),
                }
            }
        return {
            "site": self.site,
            "data_version": self.identifiers.get(self.data_version, ""),
            "unit": UNIT_EXPLANATION,
            "cap": {"epsilon": self.cap.epsilon, "delta": self.cap.delta},
            "events": [event.model_dump() for event in self.merged],
            "spent": {
                "delta": self.cap.delta,
                "replace_one": self.spent(Adjacency.REPLACE_ONE),
                "add_remove": self.spent(Adjacency.ADD_REMOVE),
            },
            **shared,
            "losses": self.losses,
            "head": self.head,
        }


def _site_of(body: Mapping[str, Any]) -> str:
    """Return the site of a row that opens a ledger or carries it forward.

    Raises:
        ValueError: its figures would be for another unit than a bag.
    """
    if body["unit"] != UNIT:
        raise ValueError("events of another unit do not compose with those of bags")
    return str(body["site"])


def _release(body: Mapping[str, Any]) -> CountRelease:
    # Through JSON, because the strict model takes lists for tuples only when it parses JSON.
    return CountRelease.model_validate_json(json.dumps(body["release"]))


def _unusable(entry: Entry, error: Exception) -> LedgerError:
    reason = f"{entry.kind!r} with unusable content ({type(error).__name__})"
    return LedgerError(f"row {entry.seq} of the ledger: {reason}")
