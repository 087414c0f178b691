"""Run a whole comparison, from a scenario file to a table, and skip the cells that are already done."""

import fnmatch
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Scalar, parse_setting
from common.errors import ConfigError
from deploy.compare.cells import Cell, Context, expand
from deploy.compare.plan import Order, Planned, State, plan, run_all
from deploy.compare.scenario import Scenario, check_settings
from deploy.compare.screen import Board, preparing, say_plan
from deploy.compare.table import Row, read_rows, summarise, write_table
from deploy.lazy import lazy_imports
from deploy.simulation import interrupt, prerequisites
from deploy.simulation.folder_lock import locked

# They bring torch and matplotlib along, which a faulty scenario need not wait for.
with lazy_imports():
    from client import training
    from deploy.compare import data as data_folders
    from deploy.compare import plots
    from deploy.simulation import simulate

_RUNS, _DATA, _REPLACED, _PLOTS = "runs", "data", "replaced", "plots"
_LOCK_SECONDS = 5.0
"""How long to wait for a comparison that was just killed to let go of the folder."""


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
        say_plan(planned, todo)
        failed: dict[str, str] = {}
        stopped = False
        if todo:
            _prepare(todo, folders, out / _REPLACED)
            # Frees the images of the source, because the cells need the memory.
            del folders
            board = Board(todo, lambda: _tabulate(scenario, planned, out))
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
    with preparing() as progress:
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
    return Order(row=row, identity=one.identity, config=config, test=str(folders.test))


def _tabulate(scenario: Scenario, planned: Sequence[Planned], out: Path) -> dict[str, Any]:
    """Write the table of the cells that are done by now, without those that must run again."""
    rows: list[Row] = []
    missing = []
    for one in planned:
        if plan(one.cell, one.run.parent, one.digest).state is State.DONE:
            rows += read_rows([one.run])
        else:
            missing.append(one.cell.name)
    return write_table(out, scenario.title, rows, missing)


def _default_jobs(todo: Sequence[Planned]) -> int:
    """Return the number of cores, or 1 where the cells share a GPU."""
    if any(training.choose_device(one.cell.config.train.device).type == "cuda" for one in todo):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
