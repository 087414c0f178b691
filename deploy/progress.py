"""Progress bars on standard error, for work of this process and for a run that writes metrics.jsonl."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deploy.tables import console

INTERVAL = 0.3


def bars() -> Progress:
    """Bars with counts and times."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved by calling the given function with (done, all); shown on first use."""
    with bars() as progress:
        task: Any = None

        def move(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(what, total=total)
            progress.update(task, completed=done, total=total)

        yield move


class Follower:
    """Shows the rounds of a run while it goes on, by reading the events that the server writes.

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
            names: set[str] = set()
            silent: set[str] = set()
            while True:
                ending = self._stop.is_set()
                for event in self._new_events():
                    match event["event"]:
                        case "enrolled" | "resumed":
                            names = set(event["sites"])
                            progress.update(rounds, completed=event["round"])
                            silent = set(names)
                        case "joined":
                            names.add(event["site"])
                            silent.add(event["site"])
                        case "update":
                            silent.discard(event["site"])
                        case "round":
                            loss = event["loss"]
                            text = f"rounds (loss {loss:.3f})" if loss is not None else "rounds"
                            progress.update(rounds, completed=event["round"], description=text)
                            silent = set(names)
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
                        case "left":
                            names.discard(event["site"])
                            silent.discard(event["site"])
                            progress.console.print(f"round {event['round']}: {event['site']} left")
                    progress.update(
                        sites,
                        total=len(names) or None,
                        completed=len(names) - len(silent),
                        description=f"sites{_without(silent)}",
                    )
                if ending:
                    return
                self._stop.wait(INTERVAL)

    def _new_events(self) -> Iterator[dict[str, Any]]:
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as stream:
            stream.seek(self._position)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield json.loads(line)


def _without(silent: set[str]) -> str:
    """Names the sites that have not answered in this round; all of them only if they are few."""
    some = sorted(silent)[:3]
    return f" (without {', '.join(some)}{' ...' if len(silent) > len(some) else ''})" if silent else ""
