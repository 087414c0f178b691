"""Read the files of a run folder, whole or while the server goes on writing them, as a run's state.

The records are those of common/run_records.py. Everything that is shown of a run, on a terminal, to
Prometheus or in a tracking tool, comes from the state computed here. The training code counts nothing for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from common.errors import UserError
from common.files import JsonLinesFile, read_json_lines
from common.records import SITE_ERRORS
from common.run_records import (
    ENROL,
    FLOWER_ERRORS,
    Cause,
    Enrolled,
    Exchanged,
    Failed,
    Finished,
    Joined,
    Left,
    RoundDone,
    RoundSkipped,
    RunEvent,
    RunSummary,
    SiteLeftOut,
    Stated,
    StoppedEarly,
    UpdateTaken,
    Waiting,
    read_event,
)
from server.run_folder import RunFolder


class Stage(StrEnum):
    """Name the stage that a run is in."""

    STARTING = "starting"
    """No site has been enrolled yet."""
    RUNNING = "running"
    WAITING = "waiting"
    """For sites, below the quorum."""
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class PhaseTimes:
    """Count how often a phase was done, and for how long."""

    count: int = 0
    seconds: float = 0.0
    """Seconds of all times together."""
    last: float = 0.0
    """Seconds of the last time."""

    def plus(self, seconds: float) -> "PhaseTimes":
        """Return the phase counted once more."""
        return PhaseTimes(self.count + 1, self.seconds + seconds, seconds)


@dataclass(frozen=True)
class SiteProgress:
    """Hold what the server knows of a site."""

    taking_part: bool = True
    """Whether it takes part, as far as its last event says."""
    why_not: str = ""
    """Why it does not take part; empty where it does."""
    updates: int = 0
    last_update: int = 0
    """The round of its last good update; 0 for none."""
    bags: int | None = None
    loss: float | None = None
    epsilon: float | None = None
    """Spent, as the site states it (replace-one bag); None where no bound holds."""
    delta: float | None = None
    epsilon_left: float | None = None
    connected: bool = True
    """Whether its node is connected."""
    answered: bool = False
    """Whether it has answered in the round under way."""


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
    """Updates in the last finished round."""
    sites: Mapping[str, SiteProgress] = field(default_factory=dict)
    turned_away: Mapping[str, str] = field(default_factory=dict)
    """Who asked to take part and was not admitted, with the reason: a name, or ``node NUMBER``. Nobody who
    takes part is changed by another's request, whatever name that one uses."""
    missing: int = 0
    """Sites that the run waits for."""
    waiting_for: tuple[str, ...] = ()
    """Their names, as far as they can be known: ``missing`` of these."""
    phases: Mapping[str, PhaseTimes] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    refusals: Mapping[Cause, int] = field(default_factory=dict)
    """Number of refusals by cause."""
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

    @property
    def connected(self) -> list[str]:
        """Return the sites whose nodes are there."""
        return [name for name, site in self.sites.items() if site.connected]

    @property
    def silent(self) -> list[str]:
        """Return the connected sites that have not answered in the round under way."""
        return [name for name in self.connected if not self.sites[name].answered]

    def after(self, event: RunEvent) -> Self:
        """Return the state after one more event.

        Of an event of an unknown kind only the time counts.
        """
        at = event.time or self.last
        state = replace(self, first=self.first or at, last=at)
        match event:
            case Enrolled():
                return state._enrolled(event)
            case Exchanged():
                phase = state.phases.get(event.phase, PhaseTimes()).plus(event.seconds)
                return replace(
                    state,
                    phases={**state.phases, event.phase: phase},
                    bytes_sent=state.bytes_sent + event.bytes_sent,
                    bytes_received=state.bytes_received + event.bytes_received,
                )
            case UpdateTaken():
                before = state._answered(event.site, event.round)
                site = replace(
                    before,
                    taking_part=True,
                    why_not="",
                    updates=before.updates + 1,
                    last_update=event.round,
                    bags=event.bags,
                    loss=event.loss,
                )
                return state._going_on()._with_site(event.site, site)
            case Stated():
                # A statement comes with every answer; of masked updates it is all that is seen before
                # their sum.
                site = replace(
                    state._answered(event.site, event.round),
                    epsilon=event.epsilon,
                    delta=event.delta,
                    epsilon_left=event.budget_left,
                )
                return state._with_site(event.site, site)
            case SiteLeftOut():
                return state._left_out(event)
            case Waiting():
                return replace(state, stage=Stage.WAITING, waiting_for=event.sites, missing=event.missing)
            case Joined():
                return state._joined(event.site)
            case Left():
                site = replace(
                    state._site(event.site), taking_part=False, why_not=event.reason, connected=False
                )
                return state._with_site(event.site, site)
            case RoundDone():
                return replace(state._round_over(event.round), updates=event.updates, loss=event.loss)
            case RoundSkipped():
                return replace(
                    state._round_over(event.round), updates=0, skipped=(*self.skipped, event.round)
                )
            case StoppedEarly():
                return replace(state, stopped_early=event.reason)
            case Finished():
                return replace(state, stage=Stage.FINISHED, missing=0, waiting_for=())
            case Failed():
                return replace(state, stage=Stage.FAILED, failure=event.reason, missing=0, waiting_for=())
            # Events that change nothing here, such as the figures of held-back bags.
            case _:
                return state

    def _enrolled(self, event: Enrolled) -> Self:
        # A resumed run enrols anew. A known site that is absent then takes no part, and keeps its history.
        absent = {
            name: replace(
                site,
                taking_part=False,
                why_not=site.why_not or "it was not there at the resumption",
                connected=False,
                answered=False,
            )
            for name, site in self.sites.items()
        }
        return replace(
            self._going_on(),
            round=event.round,
            rounds=event.rounds or self.rounds,
            sites=absent | {name: self._taking_part(name) for name in event.sites},
            # A run that goes on is no longer failed or stopped, whatever ended it before.
            failure="",
            stopped_early="",
        )

    def _joined(self, name: str) -> Self:
        missing = max(0, self.missing - 1)
        state = self if missing or self.stage is not Stage.WAITING else self._going_on()
        return replace(
            state,
            missing=missing,
            waiting_for=tuple(site for site in state.waiting_for if site != name),
            sites={**state.sites, name: state._taking_part(name)},
            turned_away={who: why for who, why in state.turned_away.items() if who != name},
        )

    def _left_out(self, event: SiteLeftOut) -> Self:
        cause = event.cause or Cause.OTHER
        state = replace(self, refusals={**self.refusals, cause: self.refusals.get(cause, 0) + 1})
        # Not put among the sites: another's request under a member's name must not mark that member as out.
        if event.phase == ENROL:
            return replace(state, turned_away={**state.turned_away, event.site: event.reason})
        site = replace(state._site(event.site), taking_part=False, why_not=event.reason)
        return state._with_site(event.site, site)

    def _round_over(self, number: int) -> Self:
        sites = {name: replace(site, answered=False) for name, site in self.sites.items()}
        return replace(self._going_on(), round=number, sites=sites)

    def _going_on(self) -> Self:
        return replace(self, stage=Stage.RUNNING, missing=0, waiting_for=())

    def _site(self, name: str) -> SiteProgress:
        return self.sites.get(name, SiteProgress())

    def _taking_part(self, name: str) -> SiteProgress:
        return replace(self._site(name), taking_part=True, why_not="", connected=True, answered=False)

    def _answered(self, name: str, number: int) -> SiteProgress:
        site = self._site(name)
        # What an evaluation on held-back bags spends is no answer to the next round.
        return replace(site, answered=True) if number > self.round else site

    def _with_site(self, name: str, site: SiteProgress) -> Self:
        return replace(self, sites={**self.sites, name: site})


def fold(events: Iterable[RunEvent], start: RunState | None = None) -> RunState:
    """Return the state after all of the events, from ``start`` or from nothing."""
    state = start or RunState()
    for event in events:
        state = state.after(event)
    return state


def run_events(run: Path) -> list[RunEvent]:
    """Return the events of a run so far, none where it has not begun.

    Raises:
        UserError: the file is damaged.
    """
    path = RunFolder(run).metrics
    try:
        return [_event(line) for line in read_json_lines(path)]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_summary(run: Path) -> RunSummary:
    """Return the content of a run's summary.json.

    Raises:
        UserError: no run, or one that has not finished, or a damaged file.
    """
    path = RunFolder(run).summary
    if not path.exists():
        known = (run / "config.toml").exists()
        raise UserError(
            f"the run has not finished: {run}\nGo on with it: fedbags simulate --out {run} --resume"
            if known
            else f"no run folder: {run}\n`fedbags runs list FOLDER` shows the runs below a folder."
        )
    try:
        return RunSummary.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def newest_run(runs: Path) -> Path | None:
    """Return the run folder below ``runs`` that was started or resumed last, or None where there is none."""
    # The configuration is written at the start and at each resumption of a run.
    started = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/config.toml")]
    return max(started)[1] if started else None


class RunSource:
    """Keep the state of a run, brought up to date at every call of refresh."""

    def __init__(self, path: Path, *, newest: bool = False) -> None:
        """Watch the run in ``path``, or the newest of the run folders below it."""
        self._path, self._newest = path, newest
        self.folder: Path | None = None
        self._events: EventsFile | None = None
        self._state = RunState()

    @property
    def name(self) -> str:
        """Return the run folder's name, which is empty while there is no run."""
        return self.folder.name if self.folder else ""

    def refresh(self) -> RunState:
        """Return the state now."""
        folder = newest_run(self._path) if self._newest else self._path
        # A newer run has begun, so the state of the previous one no longer applies.
        if folder != self.folder or self._events is None:
            self.folder = folder
            self._events = EventsFile(RunFolder(folder).metrics) if folder else None
            self._state = RunState()
        if self._events is not None:
            events, restarted = self._events.poll()
            self._state = fold(events, None if restarted else self._state)
        return self._state


class EventsFile:
    """Keep the position in the events of a run that goes on."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLinesFile(path)

    def poll(self) -> tuple[list[RunEvent], bool]:
        """Return the events since the last call, and whether they begin anew, as after a resumption."""
        news = self._lines.poll()
        return [_event(line) for line in news.lines], news.restarted


def _event(line: Mapping[str, Any]) -> RunEvent:
    event = read_event(line)
    if isinstance(event, SiteLeftOut) and event.cause is None:
        return event.model_copy(update={"cause": _cause_in_text(event.phase, event.reason)})
    return event


def _cause_in_text(phase: str, reason: str) -> Cause:
    """Return the cause in an event of 0.1, which held the reason as text only."""
    for code, text in SITE_ERRORS.items():
        if reason == text:
            return Cause[code.name]
    if reason in FLOWER_ERRORS.values():
        return Cause.LOST
    beginnings = {
        "no reply within": Cause.DEADLINE,
        "the message could not be sent": Cause.UNSENT,
        "unreadable": Cause.UNREADABLE,
        "error code": Cause.OTHER,
    }
    by_phase = {ENROL: Cause.NOT_ADMITTED, "train": Cause.UNUSABLE}
    found = (cause for beginning, cause in beginnings.items() if reason.startswith(beginning))
    return next(found, by_phase.get(phase, Cause.OTHER))
