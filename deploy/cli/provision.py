"""Define ``fedbags provision`` and ``fedbags site keygen``.

Here are the options of each command, and what it prints. Nothing is decided here: ``consortium.provision``
and ``consortium.kits`` do the work.
"""

from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from common.errors import ConfigError, UserError, require_file
from deploy.cli.say import say
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.consortium import kit as kit_folder
    from deploy.consortium import kits as kit_folders
    from deploy.consortium import pki, provision
    from deploy.consortium import settings as settings_module

_BUILD = "build"


class _BuildByDefault(typer.core.TyperGroup):
    """Take ``fedbags provision consortium.toml`` for ``fedbags provision build consortium.toml``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
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


@app.command(_BUILD)
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
    _print(
        provision.provision(
            settings, out, password=_password(password_file), keys_here=keys_here, update=update
        ),
        out,
    )


@app.command("add-key")
def _add_key(
    kits: _KitsArgument,
    site: _SiteArgument,
    public_key: Annotated[Path, typer.Argument(metavar="NODE.PUB", help="What `site keygen` wrote.")],
    days: _Days = None,
    password_file: _PasswordFile = None,
) -> None:
    """Let a site in by putting its public key into the coordinator's kit and certifying it."""
    _print(kit_folders.Kits.open(kits, _password(password_file)).add_key(site, public_key, days), kits)
    # Printed here and by `site keygen`, to compare by telephone: so an exchanged key is noticed.
    _print_fingerprint(site, pki.fingerprint(pki.read_public_key(public_key)))


@app.command("add-site")
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
    _print(kit_folders.Kits.open(kits, _password(password_file)).add_site(site, ports), kits)


@app.command("renew")
def _renew(
    kits: _KitsArgument,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[server|SITE]...", help="Whose [default: everyone's].")
    ] = None,
    days: _Days = None,
    password_file: _PasswordFile = None,
) -> None:
    """Issue certificates anew, for the same keys."""
    _print(kit_folders.Kits.open(kits, _password(password_file)).renew(names or (), days), kits)


@app.command("revoke")
def _revoke(kits: _KitsArgument, site: _SiteArgument, password_file: _PasswordFile = None) -> None:
    """Take a site out of the consortium.

    A running coordinator refuses it once its files are gone from nodes/ of its kit.
    """
    _print(kit_folders.Kits.open(kits, _password(password_file)).revoke(site), kits)
    say(f"{site} is out, as soon as its files are gone from nodes/ in the server's copy of the kit")


@app.command("update-app")
def _update_app(kits: _KitsArgument, password_file: _PasswordFile = None) -> None:
    """Bundle the app of this fedbags in place of the one before.

    Every site has to approve it.
    """
    # The app of the kits is not checked (with_app=False), because it is about to be replaced.
    changes = kit_folders.Kits.open(kits, _password(password_file), with_app=False).update_app()
    _print(changes, kits)
    say("send coordinator/app/fedbags.fab to every site: `fedbags site approve` shows them what changed")


def keygen(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="This site's kit.")],
) -> None:
    """Make this site's key pair.

    Only node.pub leaves the machine; an existing key is never overwritten.
    """
    opened = kit_folder.SiteKit.load(kit)
    public_key = kit_folders.make_node_key(opened)
    say(f"send this file to the coordinator: {public_key}")
    _print_fingerprint(opened.site, pki.fingerprint(pki.read_public_key(public_key)))


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


def _print(changes: "kit_folders.Changes", kits: Path) -> None:
    root = kits.absolute()
    for path in changes.written:
        say(f"wrote {path.absolute().relative_to(root)}")
    if not changes.written:
        say("nothing to add")
    say(f"app: {changes.app_hash}")
    if changes.waiting:
        say(f"waiting for node.pub of: {', '.join(changes.waiting)}")
