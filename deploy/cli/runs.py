"""Look at runs while they work and afterwards, and compare methods.

For ``fedbags runs``, ``status``, ``metrics``, ``track`` and ``compare``. Reads options and prints.
``deploy.runs`` and ``deploy.compare`` do the work.
"""

import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports

with lazy_imports():
    from rich import console, live

    from deploy.cli import terminal
    from deploy.compare import run as comparison
    from deploy.runs import prometheus, reading, site_state, tracking
    from deploy.runs import show as finished

_INTERVAL = 1.0
"""Seconds between two looks of the live table."""

_Watched = Annotated[
    Path, typer.Argument(help="A run folder, a folder of runs (its newest), a kit, or a site's data folder.")
]


app = typer.Typer(help="Look at finished and running runs.", no_args_is_help=True)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.")]


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"), json_: Json = False
) -> None:
    """List the runs below a folder."""
    rows = finished.list_runs(folder)
    print_json(rows) if json_ else finished.print_runs(rows, folder)


@app.command("show")
def show(run: RunFolder, json_: Json = False) -> None:
    """Show a run's figures, per level and per site, and what was left out."""
    summary = reading.read_summary(run)
    print_json(summary.to_dict()) if json_ else finished.print_summary(summary, run)


@app.command("compare")
def compare_runs(first: RunFolder, second: RunFolder, json_: Json = False) -> None:
    """Compare two finished runs by their settings, figures per level, epsilon and time.

    Example: fedbags runs compare runs/first runs/private
    """
    result = finished.compare_runs(first, second)
    print_json(result) if json_ else finished.print_comparison(result)


def status(
    path: _Watched = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Print the table and end.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and end.")] = False,
) -> None:
    """Show a run, or a site, as a live table.

    The table has sites in and out, rounds, seconds, bytes and privacy budgets. Ends by itself when the run
    has ended; Ctrl-C ends it before.

    Example: fedbags status runs/demo
    """
    watched = site_state.source(path)

    def look() -> tuple["console.RenderableType", bool]:
        if isinstance(watched, site_state.SiteSource):
            return finished.site_table(watched.refresh(), time.time()), False
        state = watched.refresh()
        return finished.run_table(state, watched.name, time.time()), state.ended

    if json_:
        state = watched.refresh()
        name = "" if isinstance(watched, site_state.SiteSource) else watched.name
        print_json(finished.as_json(state, name))
        return
    shown, ended = look()
    if once or ended:
        terminal.console().print(shown)
        return
    # Ctrl-C is the usual way to leave the live table, so it ends the command without an error.
    with live.Live(shown, console=terminal.console(), auto_refresh=False) as screen:
        try:
            while not ended:
                time.sleep(_INTERVAL)
                shown, ended = look()
                screen.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


def metrics(
    path: _Watched = Path("runs"),
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.", min=0, max=65535)] = 9464,
    address: Annotated[str, typer.Option(help="Listen here; there is no password.")] = "127.0.0.1",
) -> None:
    """Serve Prometheus metrics of a run, or of a site, until ended.

    Example: fedbags metrics KITS/coordinator --port 9464
    """
    watched = site_state.source(path)
    # Loads what the first scrape would wait for.
    watched.refresh()
    server, close = prometheus.serve(watched, port, address)
    say(f"serving http://{address}:{server.server_port}/metrics", err=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        close()


def track(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="MLflow tracking URL, or sqlite:///FILE.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Mirror what there is and end.")] = False,
) -> None:
    """Mirror a run's figures into TensorBoard and MLflow.

    Follows a running run, and imports a finished one. Needs the extra: pip install 'fedbags[tracking]'.

    Example: fedbags track runs/demo --tensorboard tb --mlflow http://127.0.0.1:5000
    """
    state = tracking.track(run, tensorboard, mlflow, follow=not once)
    say(f"{run.name}: {state.stage.value}, round {state.round} of {state.rounds}", err=True)


def compare(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="What to compare.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison; the same one goes on.")],
    data: Annotated[Path | None, typer.Option(help="Stands in for the scenario's data.path.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at once [default: cores; 1 on a GPU].")
    ] = None,
    only: Annotated[str, typer.Option(metavar="PATTERN", help="Run cells of these names only.")] = "*",
    passes: Annotated[int | None, typer.Option(min=1, help="Of every cell, whatever the file says.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of `fedbags config`, in every cell."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their states only.")] = False,
    json_: Json = False,
) -> None:
    """Compare methods by running every method, bag size, seed and setting of a scenario.

    All runs stand in one table. Stopped? The same command goes on: finished runs stay, others continue from
    their checkpoint. After a change of the scenario only the runs that it concerns run again. Writes
    table.json, table.csv, table.md and plots/ into --out. Exit status 1: some runs failed; the table has the
    others.

    \b
    Examples:
      fedbags compare benchmarks/short.toml --out compare/short
      fedbags compare SCENARIO.toml --out compare/mine --dry-run
    """
    request = comparison.Request(data, set_ or [], passes, only)
    if dry_run:
        listed = comparison.list_cells(scenario, out, request)
        if json_:
            print_json(listed)
        else:
            comparison.print_cells(listed)
        return
    outcome = comparison.compare(scenario, out, request, jobs=jobs)
    if json_:
        print_json(outcome.table)
    else:
        comparison.print_table(outcome.table, out)
    _say_end(outcome)


def _say_end(outcome: "comparison.Outcome") -> None:

    console = terminal.console(stderr=True)
    for name, text in outcome.failed.items():
        console.print(f"\nfailed: {name}", style="bold red")
        console.print(text, soft_wrap=True)
    if outcome.stopped:
        # Raised again after the table was printed, so that the command ends as after any other Ctrl-C.
        raise KeyboardInterrupt
    if outcome.failed:
        console.print(f"\n{len(outcome.failed)} cell(s) failed; the same command tries them again")
        raise typer.Exit(1)
