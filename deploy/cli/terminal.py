"""Print tables, texts and progress bars on the terminal exactly as they are.

Progress goes to standard error, for work of this process and for the rounds of a run, which are read from the
run's metrics.jsonl.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from common.run_records import Left, RoundSkipped, RunEvent, SiteLeftOut, Waiting
from common.text import visible_lines
from deploy.runs.reading import EventsFile, RunState

_INTERVAL = 0.3
"""Seconds between two looks at the events of a run."""


class _PlainConsole(Console):
    """Print texts on the terminal without taking anything in them for a command.

    No markup, emoji code or control character has an effect. Names of sites, classes, files and runs, and the
    reasons that sites give, were chosen by somebody else.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text with its control characters shown, so that a table knows how wide it is."""
        return super().render_str(visible_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable with their control characters shown.

        This includes texts that were made without render_str.
        """
        for text, style, control in super().render(renderable, options):
            # Control segments are rich's own, such as the movements of a live table.
            yield Segment(text if control else visible_lines(text), style, control)


def console(*, stderr: bool = False) -> Console:
    """Return the console that every command prints to."""
    # Without rich's own reading of a text: a class called [/x] is a name and no markup.
    return _PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def text_column(template: str) -> TextColumn:
    """Return a column of a progress bar whose text, such as ``{task.description}``, is no markup."""
    return TextColumn(template, markup=False)


def table(title: str, *columns: str) -> Table:
    """Return an empty table, in which every column but the first holds figures."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        result.add_column(name, justify="left" if number == 0 else "right")
    return result


def _bars(*, transient: bool = False) -> Progress:
    """Return a display of bars with counts and times, which goes at the end if it is transient."""
    return Progress(
        text_column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=transient,
        # A step may take longer than the half minute that rich looks back: then there was no estimate.
        speed_estimate_period=24 * 3600,
    )


@contextmanager
def named_bars(*, transient: bool = False) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield a function that makes a bar by its name, which is moved by calling it with (done, all).

    A bar appears on its first move, and all go at the end if they are transient.
    """
    with _bars(transient=transient) as progress:

        def named(what: str) -> Callable[[int, int], None]:
            task: TaskID | None = None

            def move(done: int, total: int) -> None:
                nonlocal task
                if task is None:
                    task = progress.add_task(what, total=total)
                progress.update(task, completed=done, total=total)

            return move

        yield named


@contextmanager
def counted(what: str, *, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show one bar of ``named_bars``."""
    with named_bars(transient=transient) as named:
        yield named(what)


def _done(state: RunState, rounds: int) -> float:
    """Return the number of rounds done.

    Of the round under way, the share of sites that have answered counts.
    """
    sites = len(state.connected)
    share = 1 - len(state.silent) / sites if sites else 0.0
    return min(state.round + share, rounds)


def _without(state: RunState) -> str:
    """Return the names of the sites that are still at work in the round, as text for the bar.

    Empty before the first answer.
    """
    if not state.silent or state.silent == state.connected:
        return ""
    some = sorted(state.silent)[:3]
    return f" (waiting for {', '.join(some)}{' ...' if len(state.silent) > len(some) else ''})"


def _line(event: RunEvent) -> str:
    """Return the line that is printed above the bars for an event, empty for most."""
    match event:
        case SiteLeftOut():
            return f"round {event.round}: {event.site} left out of {event.phase}: {event.reason}"
        case Waiting():
            names = f" of {', '.join(event.sites)}" if event.sites else ""
            return f"round {event.round}: waiting for {event.missing} more site(s){names}"
        case RoundSkipped():
            return (
                f"round {event.round} skipped, the model stays as it was: {', '.join(event.sites)} had done "
                "their part of this round's sum already"
            )
        case Left():
            return f"round {event.round}: {event.site} left"
        case _:
            return ""


class Follower:
    """Show the rounds of a run while it goes on, by reading the events that the server writes.

    Works alike for a server in this process, in another one, or elsewhere on a shared disk.
    """

    def __init__(self, metrics: Path, rounds: int) -> None:
        self._events, self._rounds = EventsFile(metrics), rounds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        with _bars() as progress:
            rounds = progress.add_task("rounds", total=self._rounds)
            sites = progress.add_task("sites", total=None)
            state = RunState()
            while True:
                # Asked before the events are read, so that those written last are shown as well.
                ending = self._stop.is_set()
                events, restarted = self._events.poll()
                state = RunState() if restarted else state
                for event in events:
                    state = state.after(event)
                    if text := _line(event):
                        progress.console.print(text)
                loss = f" (loss {state.loss:.3f})" if state.loss is not None else ""
                progress.update(rounds, completed=_done(state, self._rounds), description=f"rounds{loss}")
                progress.update(
                    sites,
                    total=len(state.connected) or None,
                    completed=len(state.connected) - len(state.silent),
                    description=f"sites{_without(state)}",
                )
                if ending:
                    progress.update(sites, visible=False)
                    return
                self._stop.wait(_INTERVAL)
