"""Show progress bars on standard error, for work of this process and for the rounds of a run.

The rounds are read from the run's metrics.jsonl.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deploy.cli.tables import console, text_column

INTERVAL = 0.3


def bars(*, transient: bool = False) -> Progress:
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
def counted(what: str, *, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a bar that is moved by calling the yielded function with (done, all).

    The bar appears on the first call, and goes at the end if it is transient.
    """
    with bars(transient=transient) as progress:
        task: Any = None

        def move(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(what, total=total)
            progress.update(task, completed=done, total=total)

        yield move


@dataclass
class Answers:
    """Keep track of the sites that have answered in the round that is under way."""

    sites: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    round: int = 0
    """The last finished one."""

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in one more event of the run."""
        match event["event"]:
            case "enrolled" | "resumed":
                self.sites, self.round = set(event["sites"]), event["round"]
                self.silent = set(self.sites)
            case "joined":
                self.sites.add(event["site"])
                self.silent.add(event["site"])
            # A statement comes with every answer; of masked updates it is all that is seen before their sum.
            case "update" | "statement" if event["round"] > self.round:
                self.silent.discard(event["site"])
            case "round" | "round-skipped":
                self.round, self.silent = event["round"], set(self.sites)
            case "left":
                self.sites.discard(event["site"])
                self.silent.discard(event["site"])

    def done(self, rounds: int) -> float:
        """Return the number of rounds done.

        Of the round under way, the share of sites that have answered counts.
        """
        share = 1 - len(self.silent) / len(self.sites) if self.sites else 0.0
        return min(self.round + share, rounds)

    def without(self) -> str:
        """Return the names of the sites that are still at work in the round, as text for the bar.

        Empty before the first answer.
        """
        if not self.silent or self.silent == self.sites:
            return ""
        some = sorted(self.silent)[:3]
        return f" (waiting for {', '.join(some)}{' ...' if len(self.silent) > len(some) else ''})"


def skipped(event: Mapping[str, Any]) -> str:
    """Describe a round-skipped event by its round and its sites."""
    return (
        f"round {event['round']} skipped, the model stays as it was: {', '.join(event['sites'])} had done "
        "their part of this round's sum already"
    )


class Follower:
    """Show the rounds of a run while it goes on, by reading the events that the server writes.

    Works alike for a server in this process, in another one, or elsewhere on a shared disk.
    """

    def __init__(self, metrics: Path, rounds: int) -> None:
        self._metrics, self._rounds = metrics, rounds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._position = 0

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        with bars() as progress:
            rounds = progress.add_task("rounds", total=self._rounds)
            sites = progress.add_task("sites", total=None)
            answers = Answers()
            while True:
                # Asked before the events are read, so that those written last are shown as well.
                ending = self._stop.is_set()
                for event in self._new_events():
                    answers.note(event)
                    match event["event"]:
                        case "round":
                            loss = event["loss"]
                            text = f"rounds (loss {loss:.3f})" if loss is not None else "rounds"
                            progress.update(rounds, description=text)
                        case "left-out":
                            progress.console.print(
                                f"round {event['round']}: {event['site']} left out of {event['phase']}: "
                                f"{event['reason']}"
                            )
                        case "waiting":
                            progress.console.print(
                                f"round {event['round']}: waiting for {event['missing']} more site(s)"
                                + (f" of {', '.join(event['sites'])}" if event["sites"] else "")
                            )
                        case "round-skipped":
                            progress.console.print(skipped(event))
                        case "left":
                            progress.console.print(f"round {event['round']}: {event['site']} left")
                    progress.update(rounds, completed=answers.done(self._rounds))
                    progress.update(
                        sites,
                        total=len(answers.sites) or None,
                        completed=len(answers.sites) - len(answers.silent),
                        description=f"sites{answers.without()}",
                    )
                if ending:
                    progress.update(sites, visible=False)
                    return
                self._stop.wait(INTERVAL)

    def _new_events(self) -> Iterator[dict[str, Any]]:
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as stream:
            stream.seek(self._position)
            for line in stream:
                # The server may be in the middle of writing this line. It is read the next time.
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield json.loads(line)
