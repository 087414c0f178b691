"""Read the files of a run folder, whole or while the server goes on writing them.

The records are those of common/run_records.py. The module shows and computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import JsonLinesFile, read_json_lines
from common.records import SITE_ERRORS
from common.run_records import ENROL, FLOWER_ERRORS, Cause, RunEvent, RunSummary, SiteLeftOut, read_event
from deploy.runs.state import RunState, fold
from server.run_folder import RunFolder


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
    """Keep the state of a run, brought up to date at every call of look."""

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

    def look(self) -> RunState:
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
