"""Run, show and end the programs of a consortium, and run a training in it.

These are ``fedbags server``, ``fedbags site up|status|down`` and ``fedbags run``. They read options and print
tables. ``deploy.consortium`` does the work.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import RunError, UserError
from deploy.cli.say import say
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy import configuration
    from deploy.cli import tables
    from deploy.consortium import control, foreground, programs, submit
    from deploy.consortium import kit as kit_folder
    from deploy.datasets import site_check

_Coordinator = Annotated[Path, typer.Argument(metavar="KIT", help="The coordinator's kit, KITS/coordinator.")]
_Site = Annotated[
    Path, typer.Argument(metavar="KIT", help="The site's kit, as it came from the coordinator.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
_Foreground = Annotated[bool, typer.Option("--foreground", hidden=True)]
"""Accepted and without meaning: the units and compose files of kits of 0.1 give it."""
_Wait = Annotated[float, typer.Option(help="Seconds to wait until everything is ready.", min=0)]


def _refuse_wait(wait: float | None) -> None:
    if wait is not None:
        raise UserError(
            "`up` has no --wait any more, as it stays in the foreground: `status --wait SECONDS` waits until "
            "everything is ready"
        )


_NoWait = Annotated[float | None, typer.Option("--wait", hidden=True, callback=_refuse_wait)]

_POLL = 0.3

_server_app = typer.Typer(help="Run the coordinator's side of a consortium.", no_args_is_help=True)


@_server_app.command("up")
def _server_up(kit: _Coordinator, foreground_: _Foreground = False, wait: _NoWait = None) -> None:
    """Run nginx, the SuperLink and its SuperExec until Ctrl-C or until one of them ends.

    Sites with a key are registered. Sites reach nginx on the kit's port, and there the Fleet API only. A key
    that `fedbags provision` adds or revokes later is taken up while it runs. To start it with the machine,
    and again when it ends: the kit's systemd unit or compose file.

    Example: fedbags server up KITS/coordinator
    """
    loaded = kit_folder.CoordinatorKit.load(kit)
    _log_to_standard_error()
    foreground.end_left_behind(loaded)
    programs.check_server_start(loaded)
    programs.run_coordinator(loaded)


@_server_app.command("status")
def _server_status(kit: _Coordinator, wait: _Wait = 0.0, json_: _Json = False) -> None:
    """Show the coordinator's programs, and which sites are connected.

    Exit status 1 if something is not ready.
    """
    loaded = kit_folder.CoordinatorKit.load(kit)
    found = _describe(loaded, wait)
    if found["ready"]:
        try:
            with control.control(loaded) as api:
                found["sites"] = {node.site: node.status for node in api.nodes()}
        except RunError as error:
            found |= {"ready": False, "problem": str(error)}
    _show(found, f"coordinator of {loaded.consortium}", json_)


@_server_app.command("down")
def _server_down(kit: _Coordinator) -> None:
    """End the coordinator's programs.

    A run under way ends too; `fedbags run --resume` goes on with it.
    """
    _stop(kit_folder.CoordinatorKit.load(kit))


def _site_up(
    kit: _Site,
    foreground_: _Foreground = False,
    wait: _NoWait = None,
    skip_data: Annotated[bool, typer.Option("--skip-data", help="Do not check the data first.")] = False,
) -> None:
    """Connect this site to its consortium until Ctrl-C or until one of its programs ends.

    Checks the kit, the data (`fedbags site check`), the coordinator's certificate and the clocks first.
    Nothing is opened to the network: the site calls the coordinator. Only the approved app is run. To start
    it with the machine, and again when it ends: the kit's systemd unit or compose file.

    Example: fedbags site up KIT
    """
    loaded = kit_folder.SiteKit.load(kit)
    _log_to_standard_error()
    foreground.end_left_behind(loaded)
    problem = programs.check_site_start(loaded)
    if not skip_data and (metrics := programs.check_data(loaded)):
        say(site_check.say_beyond_default(metrics), err=True)
    # No error: the coordinator may come up later, and the SuperNode tries again by itself.
    if problem:
        say(f"{problem}; trying on", err=True)
    programs.run_site(loaded)


def _site_status(kit: _Site, wait: _Wait = 0.0, json_: _Json = False) -> None:
    """Show this site's programs and whether it is connected.

    Exit status 1 if it is not.
    """
    loaded = kit_folder.SiteKit.load(kit)
    _show(_describe(loaded, wait), f"site {loaded.site} of {loaded.consortium}", json_)


def _site_down(kit: _Site) -> None:
    """Disconnect this site.

    Privacy that a run has reserved stays spent in the ledger.
    """
    _stop(kit_folder.SiteKit.load(kit))


def _run_command(
    kit: _Coordinator,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: KIT/state/runs/NAME-TIME].")] = None,
    rounds: Annotated[int | None, typer.Option(help="Federated rounds.", min=1)] = None,
    dp: Annotated[
        str | None,
        typer.Option(
            metavar="epsilon=E[,delta=D]", help="Train privately: budget of each site, replace-one bag."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of `fedbags config`.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Start from this config.toml.")] = None,
    preset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Settings of `fedbags config --preset NAME`.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json_: _Json = False,
) -> None:
    """Train with the connected sites, and show the rounds as they are done.

    The sites run the app that they approved. Waits for as many sites as have a key (--set federation.sites=N
    for fewer). The exit status is the run's: 0 completed, 1 failed or stopped. Ctrl-C asks whether to stop
    the run.

    \b
    Examples:
      fedbags run KITS/coordinator --dp epsilon=8 --set secure-aggregation.enabled=true --out runs/first
      fedbags run KITS/coordinator --resume --out runs/first
    """
    options = configuration.parse_dp(dp) | ({} if rounds is None else {"rounds": rounds})
    summary = submit.run(
        kit_folder.CoordinatorKit.load(kit),
        configuration.RunRequest(options, set_ or [], config, preset or [], out, resume),
        # Without a terminal nobody can answer, and an interruption stops the run.
        ask=sys.stdin.isatty(),
        quiet=json_,
    )
    if json_:
        typer.echo(json.dumps(summary.to_dict(), indent=2))


def register(app: typer.Typer, site_app: typer.Typer) -> None:
    """Add the commands to the command line."""
    commands: dict[str, Callable[..., None]] = {"up": _site_up, "status": _site_status, "down": _site_down}
    for name, command in commands.items():
        site_app.command(name)(command)
    app.add_typer(_server_app, name="server")
    app.command("run")(_run_command)


def _describe(kit: "kit_folder.Kit", wait: float) -> dict[str, Any]:
    until = time.monotonic() + wait
    while not (found := foreground.describe(kit))["ready"] and time.monotonic() < until:
        time.sleep(_POLL)
    return found


def _stop(kit: "kit_folder.Kit") -> None:
    ended = foreground.stop(kit)
    say(f"ended {ended} process(es)" if ended else "nothing was running")


def _show(found: dict[str, Any], title: str, json_: bool) -> None:
    if json_:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found, title)
    if not found["ready"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any], title: str) -> None:
    out = tables.console()
    rows = tables.table(title, "program", "status", "pid", "since (UTC)")
    for program in found["programs"]:
        since = program["since"].replace("T", " ").removesuffix("+00:00")
        rows.add_row(program["name"], program["status"], str(program["pid"] or ""), since)
    out.print(rows if found["programs"] else f"{title}: was never started")
    for program in found["programs"]:
        if program["reason"]:
            out.print(f"{program['name']}: {program['reason']}")
    if found["left_behind"]:
        out.print(f"{found['left_behind']} process(es) of a command that was killed; `down` ends them")
    if "problem" in found:
        out.print(found["problem"])
    if "sites" in found:
        sites = tables.table("sites", "site", "connection")
        for site, status in sorted(found["sites"].items()):
            sites.add_row(site, status)
        out.print(sites)


def _log_to_standard_error() -> None:
    # In UTC, as the times of `status`.
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
