"""Print the plan, the progress, the finished cells and the table of a comparison to the terminal."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from deploy.cli.progress import bars
from deploy.cli.tables import console, table, text_column
from deploy.compare.cells import Cell
from deploy.compare.plan import LOG, Planned, State, told
from deploy.compare.scenario import Setting
from deploy.compare.table import accuracy_cells, accuracy_header, read_rows, summarise

_LOG_LINES = 12
_LINES_TOLD = 5

Move = Callable[[int, int], None]
"""Called with (done, all)."""


def say_plan(planned: Sequence[Planned], todo: Sequence[Planned]) -> None:
    """Print how many cells are in each state, and why cells that were done run again."""
    screen = console(stderr=True)
    counts = {state: sum(one.state is state for one in planned) for state in State}
    words = [f"{number} {state.value}" for state, number in counts.items() if number]
    screen.print(f"{len(planned)} cells: {', '.join(words)}; {len(todo)} to run")
    changed = [one for one in todo if one.state is State.CHANGED]
    for one in changed[:_LINES_TOLD]:
        text = f"changed, runs again: {one.cell.name}: {told(one.differences)}"
        screen.print(text, soft_wrap=True)
    if len(changed) > _LINES_TOLD:
        screen.print(f"... and {len(changed) - _LINES_TOLD} more that changed (--dry-run --json lists them)")
    if changed:
        screen.print("their runs of before are kept in replaced/")


@contextmanager
def preparing() -> Iterator[Callable[[str], Move]]:
    """Yield a function that makes a progress bar, which appears when it first moves."""
    with bars() as progress:

        def named(what: str) -> Move:
            task: TaskID | None = None

            def move(done: int, total: int) -> None:
                nonlocal task
                if task is None:
                    task = progress.add_task(what, total=total)
                progress.update(task, completed=done, total=total)

            return move

        yield named


class Board:
    """Show a progress bar over the cells of this call, and print a line for each cell that ends."""

    def __init__(self, todo: Sequence[Planned], changed: Callable[[], object]) -> None:
        """Start with the cells to run, where ``changed`` is called whenever there is one more result."""
        self.failed: dict[str, str] = {}
        self._cells = {one.run: one.cell for one in todo}
        self._changed = changed
        self._ended: set[Path] = set()
        self._share = {run: _share_done(run, cell.config.rounds) for run, cell in self._cells.items()}
        self._started = time.monotonic()
        self._bar = Progress(
            text_column("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            text_column("left:"),
            TimeRemainingColumn(),
            console=console(stderr=True),
            # Cells differ in speed, so the estimate is made from the whole of this call.
            speed_estimate_period=24 * 3600,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("", total=sum(map(_work_of, self._cells.values())))

    def __enter__(self) -> "Board":
        self._bar.start()
        self.show([])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, running: Sequence[Path]) -> None:
        """Move the bar and name a cell at work, where ``running`` holds the folders of all of them."""
        names = "".join(f"  {self._cells[run].name}" for run in running[:1])
        more = f" + {len(running) - 1}" if len(running) > 1 else ""
        for run in running:
            self._share[run] = _share_done(run, self._cells[run].config.rounds)
        done = sum(_work_of(cell) * self._share[run] for run, cell in self._cells.items())
        text = f"{len(self._ended)} of {len(self._cells)} cells{names}{more}"
        self._bar.update(self._task, completed=done, description=text)

    def ended(self, run: Path, status: int) -> None:
        """Print how a cell ended, by the exit status of its process."""
        self._ended.add(run)
        self._share[run] = 1.0
        name = self._cells[run].name
        if status:
            self.failed[name] = _end_of_log(run, status)
            text = "FAILED: " + self.failed[name].splitlines()[-2:][0]
        else:
            (row,) = read_rows([run])
            levels = ", ".join(f"{level['name']} {level['accuracy']:.3f}" for level in row["levels"])
            text = f"{levels}, {row['seconds']:.0f} s"
            self._changed()
        minutes = (time.monotonic() - self._started) / 60
        self._bar.console.print(f"{minutes:5.1f} min  {name}: {text}", soft_wrap=True)


def _work_of(cell: Cell) -> float:
    """Return the relative amount of work of a cell, in passes over all images, for the estimate of time."""
    return cell.passes / (cell.division.number_of_sites if cell.setting is Setting.LOCAL_ONLY else 1)


def _share_done(run: Path, rounds: int) -> float:
    """Return the share of its rounds that a run has done, by its newest checkpoint."""
    names = [path.stem for path in (run / "checkpoints").glob("round-*.safetensors")]
    return int(max(names).removeprefix("round-")) / rounds if names else 0.0


def _end_of_log(run: Path, status: int) -> str:
    """Return the last lines of a cell's log, and how its process ended."""
    lines = (run / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ending = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return "\n".join([*lines[-_LOG_LINES:], f"({ending}; all of it: {run / LOG})"])


def print_cells(listed: Sequence[Mapping[str, Any]]) -> None:
    """Print the cells of list_cells as a table."""
    cells = table(f"{len(listed)} cells", "cell", "state", "passes", "rounds", "images per step")
    cells.box, cells.columns[0].overflow = SIMPLE_HEAD, "fold"
    for one in listed:
        cells.add_row(*(str(one[key]) for key in ("cell", "state", "passes", "rounds", "images_per_step")))
    console().print(cells)


def print_table(content: Mapping[str, Any], out: Path) -> None:
    """Print the accuracies and costs per setting, and the place of the whole table."""
    screen = console()
    lines = summarise(content["rows"])
    for setting in dict.fromkeys(line.setting for line in lines):
        chosen = [line for line in lines if line.setting == setting]
        names = list(dict.fromkeys(name for line in chosen for name in line.levels))
        shown = table(f"{content['title'] or 'comparison'}: {setting}, accuracy", *accuracy_header(names))
        shown.box, shown.padding, shown.show_edge = SIMPLE_HEAD, (0, 0, 0, 1), False
        # A narrow terminal wraps names and never cuts figures.
        shown.columns[0].overflow = "fold"
        for line in chosen:
            shown.add_row(*accuracy_cells(line, names))
        screen.print(shown)
    if content["missing"]:
        screen.print(f"not in it yet: {len(content['missing'])} cell(s)")
    screen.print(f"{out}: table.md, table.csv, table.json, plots/", soft_wrap=True)
