"""A whole comparison: from a scenario file to a table, whatever of it was done before."""

import fcntl
import fnmatch
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.config import Scalar, parse_setting
from common.errors import ConfigError, UserError
from deploy.compare.cell import LOG, Order
from deploy.compare.cells import Cell, expand
from deploy.compare.plan import Planned, State, plan, told
from deploy.compare.queue import run_all
from deploy.compare.scenario import Scenario, Setting, check_settings
from deploy.compare.table import (
    CSV,
    JSON,
    MARKDOWN,
    Row,
    accuracy_cells,
    accuracy_header,
    by_setting,
    read_rows,
    summarise,
    write_table,
)
from deploy.progress import counted
from deploy.tables import console, table

if TYPE_CHECKING:  # brings torch along, which a look at finished cells does not need
    from deploy.compare.data import DataFolders

RUNS, DATA, REPLACED, PLOTS, LOCK = "runs", "data", "replaced", "plots", ".lock"
LOG_LINES = 12
LOCK_SECONDS = 5.0
"""How long to wait for a comparison that was just killed to let go of the folder."""


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to."""

    table: dict[str, Any]
    failed: dict[str, str]
    """The end of its log for every cell that failed in this call."""
    stopped: bool
    """Ctrl-C ended it early."""


def compare(
    file: Path,
    out: Path,
    *,
    data: Path | None = None,
    settings: Sequence[str] = (),
    passes: int | None = None,
    only: str = "*",
    jobs: int | None = None,
) -> Outcome:
    """Run every cell of a scenario that is not done, and write the table of all that are.

    Args:
        file: the scenario.
        out: folder of the comparison: ``runs/``, ``data/``, and the table.
        data: stands in for the scenario's ``data.path``.
        settings: ``KEY=VALUE`` of the run configuration, which win over all that the file says.
        passes: wins over all passes of the file.
        only: a pattern (``*`` and ``?``): cells of other names are not run.
        jobs: cells at once; as many as cores if None, or one on a GPU.

    Raises:
        UserError: a faulty scenario or faulty data; nothing was started.
    """
    scenario, cells = read(file, settings, passes)
    with locked(out):
        planned, folders = look(scenario, cells, out, file.resolve().parent, data)
        todo = [
            one for one in planned if one.state is not State.DONE and fnmatch.fnmatch(one.cell.name, only)
        ]
        say_plan(planned, todo)
        failed: dict[str, str] = {}
        stopped = False
        if todo:
            prepare(todo, folders, out)
            try:
                failed = work(scenario, planned, todo, out, jobs or default_jobs(todo))
            except KeyboardInterrupt:
                stopped = True
        return Outcome(tabulate(scenario, planned, out), failed, stopped)


def read(file: Path, settings: Sequence[str], passes: int | None) -> tuple[Scenario, list[Cell]]:
    """The scenario and its cells."""
    scenario = Scenario.load(file)
    overrides: dict[str, Scalar] = dict(parse_setting(text) for text in settings)
    try:
        check_settings(overrides)
    except ValueError as error:
        raise ConfigError(f"--set: {error}") from error
    try:
        return scenario, expand(scenario, overrides, passes)
    except ConfigError as error:
        raise ConfigError(f"the scenario {file}: {error}") from error


def look(
    scenario: Scenario, cells: Sequence[Cell], out: Path, folder: Path, data: Path | None
) -> tuple[list[Planned], "DataFolders"]:
    """Every cell's state on disk, and the folders of its data."""
    from deploy.compare.data import DataFolders, open_data

    opened = open_data(scenario.data, folder, data)
    folders = DataFolders((out / DATA).resolve(), opened, scenario.data.skip_bad)
    return [plan(cell, (out / RUNS).resolve(), opened.digest) for cell in cells], folders


def prepare(todo: Sequence[Planned], folders: "DataFolders", out: Path) -> None:
    """Make the data folders, put changed runs aside, write every cell's order."""
    from deploy.simulate import check_model

    for config in {one.cell.config.model: one.cell.config for one in todo}.values():
        check_model(config)
    with ExitStack() as bars:
        folders.prepare((one.cell for one in todo), lambda what: bars.enter_context(counted(what)))
    for one in todo:
        cell = one.cell
        if one.state is State.CHANGED:
            aside = out / REPLACED / f"{cell.name}_{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            one.run.rename(aside)
        config = cell.config.with_changes(
            {"run-dir": str(one.run), "sites-dir": str(folders.sites_dir(cell))}
        )
        row: dict[str, Scalar] = {
            "method": cell.method,
            "bag_size": cell.bag_size,
            "seed": cell.seed,
            "setting": cell.setting.value,
            "passes": cell.passes,
        }
        if site := folders.site_name(cell):
            row["site"] = site
        Order(row=row, identity=one.identity, config=config.to_flat(), test=str(folders.test)).save(one.run)


def work(
    scenario: Scenario, planned: Sequence[Planned], todo: Sequence[Planned], out: Path, jobs: int
) -> dict[str, str]:
    """Run the cells with a bar; the table is written anew whenever one is done."""
    failed: dict[str, str] = {}
    by_run = {one.run: one.cell for one in todo}
    sizes = {one.run: _size(one.cell) for one in todo}
    ended: set[Path] = set()
    started = time.monotonic()
    with _bar() as bar:
        task = bar.add_task("", total=sum(sizes.values()))

        def show(running: Sequence[Path]) -> None:
            at_work = ", ".join(by_run[run].name for run in running[:2]) + (
                " ..." if len(running) > 2 else ""
            )
            text = f"{len(ended)} of {len(todo)} cells  {at_work}"
            bar.update(task, completed=_done(sizes, ended), description=text)

        def note(run: Path, status: int) -> None:
            ended.add(run)
            cell = by_run[run]
            minutes = (time.monotonic() - started) / 60
            if status:
                failed[cell.name] = _end_of_log(run, status)
                bar.console.print(
                    f"{minutes:.1f} min: {cell.name} FAILED: {failed[cell.name].splitlines()[-1]}",
                    markup=False,
                )
                return
            (row,) = read_rows([run])
            accuracies = ", ".join(f"{level['name']} {level['accuracy']:.3f}" for level in row["levels"])
            bar.console.print(
                f"{minutes:.1f} min: {cell.name}: {accuracies}, {row['seconds']:.0f} s", markup=False
            )
            tabulate(scenario, planned, out, draw=False)

        show([])
        run_all([one.run for one in todo], jobs, show, note)
        show([])
    return failed


def tabulate(scenario: Scenario, planned: Sequence[Planned], out: Path, draw: bool = True) -> dict[str, Any]:
    """Write the table of the cells that are done; changed ones are not, until they have run again."""
    rows: list[Row] = []
    missing = []
    for one in planned:
        found = (
            read_rows([one.run])
            if plan(one.cell, one.run.parent, str(one.identity["data.digest"])).state is State.DONE
            else []
        )
        rows += found
        missing += [] if found else [one.cell.name]
    return write_table(out, scenario.title, rows, missing)


def say_plan(planned: Sequence[Planned], todo: Sequence[Planned]) -> None:
    """How many cells there are of each state, and why finished ones run again."""
    screen = console(stderr=True)
    counts = {state: sum(one.state is state for one in planned) for state in State}
    words = [f"{number} {state.value}" for state, number in counts.items() if number]
    screen.print(f"{len(planned)} cells: {', '.join(words)}; {len(todo)} to run", markup=False)
    for one in todo:
        if one.state is State.CHANGED:
            screen.print(
                f"changed, runs again: {one.cell.name}: {told(one.differences)}", markup=False, soft_wrap=True
            )


def default_jobs(todo: Sequence[Planned]) -> int:
    """As many as cores; one where the cells share a GPU."""
    from client.training import choose_device

    if any(choose_device(one.cell.config.train.device).type == "cuda" for one in todo):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(cell: Cell) -> float:
    """How much work a cell is, for the estimate: passes over all images."""
    return cell.passes / (cell.division.sites if cell.setting is Setting.LOCAL_ONLY else 1)


def _done(sizes: Mapping[Path, float], ended: set[Path]) -> float:
    """Work done: that of the cells that ended, and of the others by their newest checkpoint."""
    done = 0.0
    for run, size in sizes.items():
        if run in ended:
            done += size
            continue
        newest = max((path.stem for path in (run / "checkpoints").glob("round-*.safetensors")), default="")
        if newest:
            rounds = _rounds(run)
            done += size * min(1.0, int(newest.removeprefix("round-")) / rounds)
    return done


def _rounds(run: Path) -> int:
    return int(Order.load(run).config["rounds"])


def _end_of_log(run: Path, status: int) -> str:
    lines = (run / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ending = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return "\n".join([*lines[-LOG_LINES:], f"({ending}; all of it: {run / LOG})"])


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder: two comparisons in it would write the same runs.

    Raises:
        UserError: another one does, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}\nChoose another folder with --out."
        ) from error
    with stream:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"another comparison is at work in {out}: wait for it, or choose another --out"
                    ) from error
                time.sleep(0.2)
        yield


def list_cells(
    file: Path, out: Path, *, data: Path | None, settings: Sequence[str], passes: int | None
) -> list[dict[str, Any]]:
    """Every cell of a scenario and its state; nothing is written."""
    scenario, cells = read(file, settings, passes)
    planned, _ = look(scenario, cells, out, file.resolve().parent, data)
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


def print_cells(listed: Sequence[Mapping[str, Any]]) -> None:
    """The cells as a table."""
    cells = table(f"{len(listed)} cells", "cell", "state", "passes", "rounds", "images per step")
    for one in listed:
        cells.add_row(*(str(one[key]) for key in ("cell", "state", "passes", "rounds", "images_per_step")))
    console().print(cells)


def print_table(content: Mapping[str, Any], out: Path) -> None:
    """Accuracies and costs per setting, and where the whole table is."""
    screen = console()
    for setting, lines in by_setting(summarise(content["rows"])).items():
        names = list(dict.fromkeys(name for line in lines for name in line.levels))
        shown = table(f"{content['title'] or 'comparison'}: {setting}", *accuracy_header(names))
        for line in lines:
            shown.add_row(*accuracy_cells(line, names))
        screen.print(shown)
    if content["missing"]:
        screen.print(f"not in it yet: {len(content['missing'])} cell(s)", markup=False)
    screen.print(f"{out / MARKDOWN}, {CSV}, {JSON}, {PLOTS}/", soft_wrap=True, markup=False)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Cells differ in speed: the estimate is from all that was seen in this call.
    with Progress(*columns, console=console(stderr=True), speed_estimate_period=24 * 3600) as bar:
        yield bar
