"""Compute the state of a run from the events that its server writes (server/run_folder.py).

Everything that is shown of a run, on a terminal, to Prometheus or in a tracking tool, comes from here. The
training code counts nothing for it. The functions are pure, and read no file and no clock.

Follow a file of JSON lines that another process writes, such as a run's events or a site's journal.

Only new lines are read. A file that was replaced (a resumed run drops the events of rounds that it will do
again) is read from its start, and the caller is told so. The module does not interpret the lines.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from common.records import SITE_ERRORS, SiteError
from server.exchange import FLOWER_ERRORS

Event = Mapping[str, Any]


class Stage(StrEnum):
    """Name the stage that a run is in."""

    STARTING = "starting"
    """No site has been enrolled yet."""
    RUNNING = "running"
    WAITING = "waiting"
    """For sites, below the quorum."""
    FINISHED = "finished"
    FAILED = "failed"


LOST, DEADLINE, UNSENT, UNREADABLE, UNUSABLE, NOT_ADMITTED, OTHER = (
    "lost", "deadline", "unsent", "unreadable", "unusable", "not-admitted", "other",
)  # fmt: skip


def site_cause(code: SiteError) -> str:
    """Return the cause for an error code of a site."""
    return code.name.lower().replace("_", "-")


CAUSES = (
    *(site_cause(code) for code in SiteError),
    *(LOST, DEADLINE, UNSENT, UNREADABLE, UNUSABLE, NOT_ADMITTED, OTHER),
)
"""Every cause for which something of a site is not used: a closed set, so that no text of a site becomes a
label of a metric."""

# Events hold the reason as text only, so the cause is found again by the texts that the server writes.
_BY_TEXT = {
    **{text: site_cause(code) for code, text in SITE_ERRORS.items()},
    **dict.fromkeys(FLOWER_ERRORS.values(), LOST),
}
_BY_BEGINNING = {
    "no reply within": DEADLINE,
    "the message could not be sent": UNSENT,
    "unreadable": UNREADABLE,
    "error code": OTHER,
}
ENROL = "enrol"
_BY_PHASE = {ENROL: NOT_ADMITTED, "train": UNUSABLE}


def cause_of(phase: str, reason: str) -> str:
    """Return the cause, one of CAUSES, for the reason of a ``left-out`` event."""
    if reason in _BY_TEXT:
        return _BY_TEXT[reason]
    for beginning, cause in _BY_BEGINNING.items():
        if reason.startswith(beginning):
            return cause
    return _BY_PHASE.get(phase, OTHER)


@dataclass(frozen=True)
class Phase:
    """Count how often a phase was done, and for how long."""

    count: int = 0
    seconds: float = 0.0
    """In all."""
    last: float = 0.0
    """The last time."""

    def plus(self, seconds: float) -> "Phase":
        """Return the phase counted once more."""
        return Phase(self.count + 1, self.seconds + seconds, seconds)


@dataclass(frozen=True)
class Site:
    """Hold what the server knows of a site."""

    taking_part: bool = True
    """Whether the last thing heard of it was good."""
    why_not: str = ""
    """The reason where it is not."""
    updates: int = 0
    last_update: int = 0
    """The round of its last good update; 0 for none."""
    bags: int | None = None
    loss: float | None = None
    epsilon: float | None = None
    """Spent, as the site states it (replace-one bag); None where no bound holds."""
    delta: float | None = None
    epsilon_left: float | None = None


@dataclass(frozen=True)
class RunState:
    """Hold the state of a run after some of its events."""

    stage: Stage = Stage.STARTING
    round: int = 0
    """The last finished round."""
    rounds: int = 0
    """All that the run will have; 0 while that is not known."""
    loss: float | None = None
    updates: int = 0
    """In the last finished round."""
    sites: Mapping[str, Site] = field(default_factory=dict)
    turned_away: Mapping[str, str] = field(default_factory=dict)
    """Who asked to take part and was not admitted, with the reason: a name, or ``node NUMBER``. Nobody who
    takes part is changed by another's request, whatever name that one uses."""
    missing: int = 0
    """Sites that the run waits for."""
    waiting_for: tuple[str, ...] = ()
    """Their names, as far as they can be known: ``missing`` of these."""
    phases: Mapping[str, Phase] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    """By cause; only those that happened."""
    failure: str = ""
    skipped: tuple[int, ...] = ()
    """Rounds that left the model as it was, since sites had unmasked their sum before and it was lost."""
    stopped_early: str = ""
    """Why the run ended well before its last round, if it did."""
    first: float = 0.0
    """Time of the first event, seconds since 1970; 0 while there is none."""
    last: float = 0.0

    @property
    def ended(self) -> bool:
        """Tell whether nothing more will happen, unless the run is resumed."""
        return self.stage in (Stage.FINISHED, Stage.FAILED)

    def count(self, *, taking_part: bool) -> int:
        """Return the number of sites that take part, or that do not."""
        return sum(site.taking_part is taking_part for site in self.sites.values())

    def after(self, event: Event) -> Self:
        """Return the state after one more event.

        Of an event of an unknown kind only the time counts.
        """
        at = float(event.get("time", self.last))
        state = replace(self, first=self.first or at, last=at)
        match event.get("event"):
            case "enrolled" | "resumed":
                return state._enrolled(event)
            case "phase":
                return state._phase(event)
            case "update":
                before = state._site(event)
                site = replace(
                    before,
                    taking_part=True,
                    why_not="",
                    updates=before.updates + 1,
                    last_update=int(event["round"]),
                    bags=event.get("bags"),
                    loss=event.get("loss"),
                )
                return state._going_on()._with_site(event, site)
            case "statement":
                site = replace(
                    state._site(event),
                    epsilon=event.get("epsilon"),
                    delta=event.get("delta"),
                    epsilon_left=event.get("budget_left"),
                )
                return state._with_site(event, site)
            case "left-out":
                return state._left_out(event)
            case "waiting":
                names, missing = tuple(map(str, event.get("sites", ()))), int(event.get("missing", 0))
                return replace(state, stage=Stage.WAITING, waiting_for=names, missing=missing)
            case "joined":
                return state._joined(event)
            case "left":
                site = replace(state._site(event), taking_part=False, why_not=str(event.get("reason", "")))
                return state._with_site(event, site)
            case "round":
                return replace(
                    state._going_on(),
                    round=int(event["round"]),
                    updates=int(event.get("updates", 0)),
                    loss=event.get("loss"),
                )
            case "round-skipped":
                number = int(event["round"])
                return replace(state._going_on(), round=number, updates=0, skipped=(*self.skipped, number))
            case "stopped-early":
                return replace(state, stopped_early=str(event.get("reason", "")))
            case "finished":
                return replace(state, stage=Stage.FINISHED, missing=0, waiting_for=())
            case "failed":
                return replace(
                    state, stage=Stage.FAILED, failure=str(event.get("reason", "")), missing=0, waiting_for=()
                )
            # Events that change nothing here, such as the figures of held-back bags.
            case _:
                return state

    def _enrolled(self, event: Event) -> Self:
        # A resumed run enrols anew. A known site that is absent then takes no part, and keeps its history.
        names = {str(name) for name in event.get("sites", ())}
        sites = {
            name: replace(
                site, taking_part=False, why_not=site.why_not or "it was not there at the resumption"
            )
            for name, site in self.sites.items()
        } | {name: replace(self.sites.get(name, Site()), taking_part=True, why_not="") for name in names}
        return replace(
            self._going_on(),
            round=int(event.get("round", 0)),
            rounds=int(event.get("rounds", self.rounds)),
            sites=sites,
            # A run that goes on is no longer failed or stopped, whatever ended it before.
            failure="",
            stopped_early="",
        )

    def _phase(self, event: Event) -> Self:
        name = str(event["phase"])
        phase = self.phases.get(name, Phase()).plus(float(event["seconds"]))
        return replace(
            self,
            phases={**self.phases, name: phase},
            bytes_sent=self.bytes_sent + int(event.get("bytes_sent", 0)),
            bytes_received=self.bytes_received + int(event.get("bytes_received", 0)),
        )

    def _joined(self, event: Event) -> Self:
        name = str(event["site"])
        missing = max(0, self.missing - 1)
        state = self if missing or self.stage is not Stage.WAITING else self._going_on()
        return replace(
            state,
            missing=missing,
            waiting_for=tuple(site for site in state.waiting_for if site != name),
            sites={**state.sites, name: replace(state._site(event), taking_part=True, why_not="")},
            turned_away={who: why for who, why in state.turned_away.items() if who != name},
        )

    def _left_out(self, event: Event) -> Self:
        phase, reason = str(event.get("phase", "")), str(event.get("reason", ""))
        cause = cause_of(phase, reason)
        state = replace(self, refusals={**self.refusals, cause: self.refusals.get(cause, 0) + 1})
        # Not put among the sites: another's request under a member's name must not mark that member as out.
        if phase == ENROL:
            return replace(state, turned_away={**state.turned_away, str(event["site"]): reason})
        return state._with_site(event, replace(state._site(event), taking_part=False, why_not=reason))

    def _going_on(self) -> Self:
        return replace(self, stage=Stage.RUNNING, missing=0, waiting_for=())

    def _site(self, event: Event) -> Site:
        return self.sites.get(str(event["site"]), Site())

    def _with_site(self, event: Event, site: Site) -> Self:
        return replace(self, sites={**self.sites, str(event["site"]): site})


def fold(events: Iterable[Event], start: RunState | None = None) -> RunState:
    """Return the state after all of the events, from ``start`` or from nothing."""
    state = start or RunState()
    for event in events:
        state = state.after(event)
    return state


@dataclass(frozen=True)
class News:
    """Hold the lines that one call found."""

    lines: tuple[dict[str, Any], ...]
    restarted: bool
    """The file is not the one read before, or shorter: ``lines`` begin at its start."""


class JsonLinesFile:
    """Keep the position in a growing file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._position = 0

    def poll(self) -> News:
        """Return the complete lines that were added since the last call, or none where there is no file.

        A last line without its end is left for the next call. A line that is no JSON object (the disk was
        full in the middle of it) is left out.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            restarted, self._file, self._position = self._file is not None, None, 0
            return News((), restarted)
        with stream:
            status = os.fstat(stream.fileno())
            file = (status.st_dev, status.st_ino)
            # A replaced file has another inode, and one that was cut in place ends before the position.
            restarted = self._file is not None and (file != self._file or status.st_size < self._position)
            if restarted:
                self._position = 0
            self._file = file
            stream.seek(self._position)
            lines = []
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                value = _object(line)
                if value is not None:
                    lines.append(value)
        return News(tuple(lines), restarted)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
