"""Show, serve or mirror the figures of a run or a site while it works.

These are ``fedbags status``, ``metrics`` and ``track``. They read options and print. ``deploy.runs`` does
the work.
"""

import json
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.say import say
from deploy.lazy import lazy_imports

with lazy_imports():
    from rich import console, live

    from deploy.cli import tables
    from deploy.runs import (
        prometheus,
        show,
        site_state,
        tracking,
    )

_INTERVAL = 1.0
"""Seconds between two looks of the live table."""

_Watched = Annotated[
    Path,
    typer.Argument(help="A run folder, a folder of runs (its newest), a kit, or a site's data folder."),
]


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
            return show.site_table(watched.refresh(), time.time()), False
        state = watched.refresh()
        return show.run_table(state, watched.name, time.time()), state.ended

    if json_:
        state = watched.refresh()
        name = "" if isinstance(watched, site_state.SiteSource) else watched.name
        typer.echo(json.dumps(show.as_json(state, name), indent=2))
        return
    shown, ended = look()
    if once or ended:
        tables.console().print(shown)
        return
    # Ctrl-C is the usual way to leave the live table, so it ends the command without an error.
    with live.Live(shown, console=tables.console(), auto_refresh=False) as screen:
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
