"""Compare methods side by side, for ``fedbags compare``.

Reads options and prints tables and failures. ``deploy.compare`` does the work.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.cli import tables
    from deploy.compare import run, screen


def compare_command(
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
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
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
    request = run.Request(data, set_ or [], passes, only)
    if dry_run:
        listed = run.list_cells(scenario, out, request)
        if json_:
            typer.echo(json.dumps(listed, indent=2))
        else:
            screen.print_cells(listed)
        return
    outcome = run.compare(scenario, out, request, jobs=jobs)
    if json_:
        typer.echo(json.dumps(outcome.table, indent=2))
    else:
        screen.print_table(outcome.table, out)
    _say_end(outcome)


def _say_end(outcome: "run.Outcome") -> None:

    console = tables.console(stderr=True)
    for name, text in outcome.failed.items():
        console.print(f"\nfailed: {name}", style="bold red")
        console.print(text, soft_wrap=True)
    if outcome.stopped:
        # Raised again after the table was printed, so that the command ends as after any other Ctrl-C.
        raise KeyboardInterrupt
    if outcome.failed:
        console.print(f"\n{len(outcome.failed)} cell(s) failed; the same command tries them again")
        raise typer.Exit(1)
