"""Provision a consortium, run its programs, and train in it.

These are ``fedbags provision``, ``server``, ``run``, and ``site keygen|up|status|down``. They read options
and print; nothing is decided here, ``deploy.consortium`` does the work.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core

from common.errors import ConfigError, RunError, UserError, require_file
from deploy import cli
from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy import configuration
    from deploy.cli import terminal
    from deploy.consortium import control, foreground, pki, programs, provision, submit
    from deploy.consortium import kit as kit_folder
    from deploy.consortium import kits as kit_folders
    from deploy.consortium import settings as settings_module
    from deploy.datasets import site_check

_Coordinator = Annotated[Path, typer.Argument(metavar="KIT", help="The coordinator's kit, KITS/coordinator.")]
_Site = Annotated[
    Path, typer.Argument(metavar="KIT", help="The site's kit, as it came from the coordinator.")
]
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
def _server_status(kit: _Coordinator, wait: _Wait = 0.0, json_: Json = False) -> None:
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


def _site_status(kit: _Site, wait: _Wait = 0.0, json_: Json = False) -> None:
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
    rounds: cli.Rounds = None,
    dp: cli.Dp = None,
    set_: cli.Settings = None,
    config: cli.ConfigFile = None,
    preset: cli.Presets = None,
    resume: cli.Resume = False,
    json_: Json = False,
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
        print_json(summary.to_dict())


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
        print_json(found)
    else:
        _print(found, title)
    if not found["ready"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any], title: str) -> None:
    out = terminal.console()
    rows = terminal.table(title, "program", "status", "pid", "since (UTC)")
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
        sites = terminal.table("sites", "site", "connection")
        for site, status in sorted(found["sites"].items()):
            sites.add_row(site, status)
        out.print(sites)


def _log_to_standard_error() -> None:
    # In UTC, as the times of `status`.
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")


_BUILD = "build"


class _BuildByDefault(typer.core.TyperGroup):
    """Take ``fedbags provision consortium.toml`` for ``fedbags provision build consortium.toml``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_BUILD, *args]
        return super().parse_args(ctx, args)


provision_app = typer.Typer(
    cls=_BuildByDefault,
    no_args_is_help=True,
    help="""Make the kits from which the coordinator and the sites of a consortium start.

\b
  fedbags provision consortium.toml --out KITS    make them, or add what is missing
  fedbags provision add-key KITS SITE node.pub    let a site in
""",
)

_KitsArgument = Annotated[Path, typer.Argument(metavar="KITS", help="The folder of kits.")]
_SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")]
_PasswordFile = Annotated[
    Path | None,
    typer.Option(help="File whose first line is the password of the authority's key.", show_default=False),
]
_Days = Annotated[
    int | None,
    typer.Option(
        help="How long the certificate holds [default: as [validity] of consortium.toml says].",
        min=1,
        max=7300,
        show_default=False,
    ),
]


@provision_app.command(_BUILD)
def _build(
    settings: Annotated[Path, typer.Argument(metavar="CONSORTIUM.TOML", help="The consortium's settings.")],
    out: Annotated[Path, typer.Option(help="The folder of kits.")],
    keys_here: Annotated[
        bool, typer.Option("--keys-here", help="Make the sites' private keys here too: for trials only.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Take over changed settings; keys and app stay.")
    ] = False,
    password_file: _PasswordFile = None,
) -> None:
    """Make the kits, or add what is missing to those that are there.

    Keys are never overwritten.

    Example: fedbags provision consortium.toml --out KITS
    """
    _print_changes(
        provision.provision(
            settings, out, password=_password(password_file), keys_here=keys_here, update=update
        ),
        out,
    )


@provision_app.command("add-key")
def _add_key(
    kits: _KitsArgument,
    site: _SiteArgument,
    public_key: Annotated[Path, typer.Argument(metavar="NODE.PUB", help="What `site keygen` wrote.")],
    days: _Days = None,
    password_file: _PasswordFile = None,
) -> None:
    """Let a site in by putting its public key into the coordinator's kit and certifying it."""
    _print_changes(_open(kits, password_file).add_key(site, public_key, days), kits)
    # Printed here and by `site keygen`, to compare by telephone: so an exchanged key is noticed.
    _print_fingerprint(site, pki.fingerprint(pki.read_public_key(public_key)))


@provision_app.command("add-site")
def _add_site(
    kits: _KitsArgument,
    site: _SiteArgument,
    runtime_port: Annotated[int, typer.Option(help="Of the SuperNode at the site.", min=1, max=65535)] = 9094,
    metrics_port: Annotated[int, typer.Option(help="Of /metrics there; 0: none.", min=0, max=65535)] = 9095,
    password_file: _PasswordFile = None,
) -> None:
    """Add a site and make its kit.

    Its key comes later with `add-key`.
    """
    try:
        ports = settings_module.SitePorts(runtime_port=runtime_port, metrics_port=metrics_port)
    except ValueError as error:
        raise ConfigError("--runtime-port and --metrics-port need two different numbers") from error
    _print_changes(_open(kits, password_file).add_site(site, ports), kits)


@provision_app.command("renew")
def _renew(
    kits: _KitsArgument,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[server|SITE]...", help="Whose [default: everyone's].")
    ] = None,
    days: _Days = None,
    password_file: _PasswordFile = None,
) -> None:
    """Issue certificates anew, for the same keys."""
    _print_changes(_open(kits, password_file).renew(names or (), days), kits)


@provision_app.command("revoke")
def _revoke(kits: _KitsArgument, site: _SiteArgument, password_file: _PasswordFile = None) -> None:
    """Take a site out of the consortium.

    A running coordinator refuses it once its files are gone from nodes/ of its kit.
    """
    _print_changes(_open(kits, password_file).revoke(site), kits)
    say(f"{site} is out, as soon as its files are gone from nodes/ in the server's copy of the kit")


@provision_app.command("update-app")
def _update_app(kits: _KitsArgument, password_file: _PasswordFile = None) -> None:
    """Bundle the app of this fedbags in place of the one before.

    Every site has to approve it.
    """
    # The app of the kits is not checked (with_app=False), because it is about to be replaced.
    changes = kit_folders.Kits.open(kits, _password(password_file), with_app=False).update_app()
    _print_changes(changes, kits)
    say("send coordinator/app/fedbags.fab to every site: `fedbags site approve` shows them what changed")


def keygen(kit: Annotated[Path, typer.Argument(metavar="KIT", help="This site's kit.")]) -> None:
    """Make this site's key pair.

    Only node.pub leaves the machine; an existing key is never overwritten.
    """
    opened = kit_folder.SiteKit.load(kit)
    public_key = kit_folders.make_node_key(opened)
    say(f"send this file to the coordinator: {public_key}")
    _print_fingerprint(opened.site, pki.fingerprint(pki.read_public_key(public_key)))


def _open(kits: Path, password_file: Path | None) -> "kit_folders.Kits":
    return kit_folders.Kits.open(kits, _password(password_file))


def _password(path: Path | None) -> bytes | None:
    if path is None:
        return None
    require_file(path, "the password file", "Its first line is the password.")
    first, *_ = path.read_bytes().splitlines() or [b""]
    if not first:
        raise UserError(f"{path}: the first line is empty, and it should be the password")
    return first


def _print_fingerprint(site: str, fingerprint: str) -> None:
    say(f"fingerprint of {site}: {fingerprint}")


def _print_changes(changes: "kit_folders.Changes", kits: Path) -> None:
    root = kits.absolute()
    for path in changes.written:
        say(f"wrote {path.absolute().relative_to(root)}")
    if not changes.written:
        say("nothing to add")
    say(f"app: {changes.app_hash}")
    if changes.waiting:
        say(f"waiting for node.pub of: {', '.join(changes.waiting)}")
