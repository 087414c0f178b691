"""Run a whole comparison, from a scenario file to a table, and skip the cells that are already done.

The plan, the progress, the finished cells and the table are printed on the terminal.
"""

import fnmatch
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from common.config import Scalar, parse_setting
from common.errors import ConfigError
from deploy.cli.terminal import console, named_bars, table, text_column
from deploy.compare.plan import LOG, Order, Planned, State, plan, run_all, told
from deploy.compare.scenario import Cell, Context, Scenario, Setting, check_settings, expand
from deploy.compare.table import Row, accuracy_grid, read_rows, summarise, write_table
from deploy.lazy import lazy_imports
from deploy.simulation import interrupt, prerequisites
from deploy.simulation.prerequisites import locked

# They bring torch and matplotlib along, which a faulty scenario need not wait for.
with lazy_imports():
    from client import training
    from deploy.compare import data as data_folders
    from deploy.compare import plots
    from deploy.simulation import simulate

_RUNS, _DATA, _REPLACED, _PLOTS = "runs", "data", "replaced", "plots"
_LOCK_SECONDS = 5.0
"""How long to wait for a comparison that was just killed to let go of the folder."""
_LOG_LINES = 12
_LINES_TOLD = 5


@dataclass(frozen=True)
class Request:
    """Say which cells of a scenario are wanted, and what differs from what its file says.

    Attributes:
        data: stands in for the scenario's ``data.path``.
        settings: ``KEY=VALUE`` of the run configuration, which win over all that the file says.
        passes: wins over all passes of the file.
        only: a pattern (``*`` and ``?``): cells of other names are not run.
    """

    data: Path | None = None
    settings: Sequence[str] = ()
    passes: int | None = None
    only: str = "*"


@dataclass(frozen=True)
class Outcome:
    """Hold the result of a comparison."""

    table: dict[str, Any]
    """The content of table.json."""
    failed: dict[str, str]
    """The end of its log for every cell that failed in this call."""
    stopped: bool
    """Whether Ctrl-C ended it early."""


def compare(file: Path, out: Path, request: Request = Request(), *, jobs: int | None = None) -> Outcome:
    """Run every cell of a scenario that is not done, and write the table and plots of all that are.

    Args:
        file: the scenario.
        out: folder of the comparison: ``runs/``, ``data/``, ``plots/`` and the table.
        request: what differs from the file.
        jobs: cells at once; as many as cores if None, or one on a GPU.

    Returns:
        The table, the cells that failed in this call, and whether Ctrl-C ended it.

    Raises:
        UserError: a faulty scenario or faulty data; nothing was started.
    """
    scenario, cells = _read(file, request)
    chosen = _of_names(cells, request.only)
    for cell in chosen:
        prerequisites.check(cell.config)
    interrupt.at("the comparison: what is done stays, and the same command goes on")
    # Two comparisons in one folder would train the same cells in the same run folders.
    with locked(out, "another comparison", _LOCK_SECONDS):
        planned, folders = _look(scenario, cells, out, file.resolve().parent, request.data)
        todo = [one for one in planned if one.state is not State.DONE and one.cell in chosen]
        _say_plan(planned, todo)
        failed: dict[str, str] = {}
        stopped = False
        if todo:
            _prepare(todo, folders, out / _REPLACED)
            # Frees the images of the source, because the cells need the memory.
            del folders
            board = _Board(todo, lambda: _tabulate(scenario, planned, out))
            try:
                with board:
                    run_all([one.run for one in todo], jobs or _default_jobs(todo), board.show, board.ended)
            except KeyboardInterrupt:
                stopped = True
            failed = board.failed
        table = _tabulate(scenario, planned, out)
        if table["rows"]:
            plots.draw_plots(summarise(table["rows"]), scenario.title, out / _PLOTS)
        return Outcome(table, failed, stopped)


def list_cells(file: Path, out: Path, request: Request = Request()) -> list[dict[str, Any]]:
    """Return the cells of a scenario with their states, without writing anything.

    Arguments and errors are those of compare.
    """
    scenario, cells = _read(file, request)
    folder = file.resolve().parent
    planned, _ = _look(scenario, _of_names(cells, request.only), out, folder, request.data)
    return [
        {
            "cell": one.cell.name,
            "state": one.state.value,
            "passes": one.cell.passes,
            "rounds": one.cell.config.rounds,
            "images_per_step": one.cell.config.train.bags_per_step * one.cell.bag_size,
            "differences": list(one.differences),
        }
        for one in planned
    ]


def _read(file: Path, request: Request) -> tuple[Scenario, list[Cell]]:
    """Read the scenario file and return the scenario with its cells.

    Raises:
        UserError: what is wrong with the file or the settings.
    """
    scenario = Scenario.load(file)
    overrides: dict[str, Scalar] = dict(parse_setting(text) for text in request.settings)
    try:
        check_settings(overrides)
    except ValueError as error:
        raise ConfigError(f"--set: {error}") from error
    try:
        return scenario, expand(scenario, Context(file.resolve().parent, overrides, request.passes))
    except ConfigError as error:
        raise ConfigError(f"the scenario {file}: {error}") from error


def _of_names(cells: Sequence[Cell], pattern: str) -> list[Cell]:
    """Return the cells whose name matches the pattern.

    Raises:
        ConfigError: no name matches.
    """
    chosen = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, pattern)]
    if not chosen:
        raise ConfigError(
            f"--only {pattern!r} is the name of no cell; cells have names such as {cells[0].name!r} "
            "(--dry-run lists them all)"
        )
    return chosen


def _look(
    scenario: Scenario, cells: Sequence[Cell], out: Path, folder: Path, data: Path | None
) -> tuple[list[Planned], "data_folders.DataFolders"]:
    """Return every cell with its state on disk, and the folders of its data.

    Args:
        scenario: the scenario.
        cells: the cells to find the state of.
        out: folder of the comparison.
        folder: where relative paths of the scenario start.
        data: stands in for the scenario's ``data.path``.
    """
    opened = data_folders.open_data(scenario.data, folder, data)
    folders = data_folders.DataFolders((out / _DATA).resolve(), opened, scenario.data.skip_bad)
    return [plan(cell, (out / _RUNS).resolve(), opened.digest) for cell in cells], folders


def _prepare(todo: Sequence[Planned], folders: "data_folders.DataFolders", replaced: Path) -> None:
    """Create the data folders, move changed runs to ``replaced``, and write every cell's order.

    Raises:
        UserError: a model that cannot be built, or data that cannot be divided so.
    """
    # Every model is built once before the data are written, so that a faulty setting ends the command early.
    for config in {one.cell.config.model: one.cell.config for one in todo}.values():
        simulate.check_model(config)
    with named_bars() as progress:
        folders.prepare((one.cell for one in todo), progress)
    for one in todo:
        if one.state is State.CHANGED:
            replaced.mkdir(parents=True, exist_ok=True)
            one.run.rename(replaced / f"{one.cell.name}_{time.strftime('%Y%m%d-%H%M%S')}")
        _order(one, folders).save(one.run)


def _order(one: Planned, folders: "data_folders.DataFolders") -> Order:
    """Return the order for the process of this cell."""
    cell = one.cell
    places: dict[str, Scalar] = {"run-dir": str(one.run), "sites-dir": str(folders.sites_dir(cell))}
    row: dict[str, Scalar] = {
        "method": cell.method,
        "bag_size": cell.bag_size,
        "images_per_bag": round(folders.images_per_bag(cell), 2),
        "seed": cell.seed,
        "setting": cell.setting.value,
        "passes": cell.passes,
    }
    if site := folders.site_name(cell):
        row["site"] = site
    config = cell.config.with_changes(places).to_flat()
    test = str(folders.test)
    return Order(row=row, identity=one.identity, config=config, test=test, probes=cell.probes)


def _tabulate(scenario: Scenario, planned: Sequence[Planned], out: Path) -> dict[str, Any]:
    """Write the table of the cells that are done by now, without those that must run again."""
    rows: list[Row] = []
    missing = []
    for one in planned:
        if plan(one.cell, one.run.parent, one.digest).state is State.DONE:
            rows += read_rows([one.run], one.cell.probes)
        else:
            missing.append(one.cell.name)
    return write_table(out, scenario.title, rows, missing)


def _default_jobs(todo: Sequence[Planned]) -> int:
    """Return the number of cores, or 1 where the cells share a GPU."""
    if any(training.choose_device(one.cell.config.train.device).type == "cuda" for one in todo):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say_plan(planned: Sequence[Planned], todo: Sequence[Planned]) -> None:
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


class _Board:
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

    def __enter__(self) -> "_Board":
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
        header, body = accuracy_grid(chosen)
        shown = table(f"{content['title'] or 'comparison'}: {setting}, accuracy", *header)
        shown.box, shown.padding, shown.show_edge = SIMPLE_HEAD, (0, 0, 0, 1), False
        # A narrow terminal wraps names and never cuts figures.
        shown.columns[0].overflow = "fold"
        for cells in body:
            shown.add_row(*cells)
        screen.print(shown)
    if content["missing"]:
        screen.print(f"not in it yet: {len(content['missing'])} cell(s)")
    screen.print(f"{out}: table.md, table.csv, table.json, plots/", soft_wrap=True)
