"""Show what an app would change at a site, and let it run there or not, for ``fedbags site approve``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.say import say
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.consortium import app as apps
    from deploy.consortium import kit as kit_folder


def approve_command(
    kit: Annotated[Path, typer.Argument(help="This site's kit folder.")],
    app: Annotated[Path, typer.Argument(help="The app: a .fab file, or its folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show every changed line as well.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; approves only with --yes.")
    ] = False,
) -> None:
    """Show what an app would change at this site, and approve it.

    The site runs no other app than the one that it approved. Nothing of the app is run by this. A running
    site takes the approval over at its next task.

    Example: fedbags site approve KIT KIT/state/refused.fab
    """
    site = kit_folder.SiteKit.load(kit)
    new = apps.read_app(app)
    kept = site.app.read_bytes() if site.app.is_file() else b""
    # The kit's copy is compared with only if it has the approved hash. A copy that was exchanged would let a
    # hostile app seem unchanged.
    known = kit_folder.app_hash(kept) == site.app_hash
    old = apps.read_bundle(kept, str(site.app)) if known else None
    changes = apps.compare(old, new)
    same = new.hash == site.app_hash
    if not json_:
        say(f"approved now: {site.app_hash}\nthis app:     {new.hash}")
        if same:
            say("This is the app that the site has approved.")
        elif not known:
            say("The kit does not hold the app that it approves now: all of this one is shown as added.")
        for line in apps.in_words(changes) if not same else []:
            say(line)
        for line in apps.unified_diff(old, new) if diff else []:
            say(line)
    # With --json nobody is asked, so that only --yes approves.
    approve = yes or (not (json_ or same) and typer.confirm("Let this app run on this site's data?"))
    if approve:
        site.approve(new.content)
    if json_:
        answer = {"before": site.app_hash, "app": new.hash, "approved": approve or same}
        typer.echo(json.dumps(answer | {"changes": changes.to_json()}, indent=2))
    elif approve and not same:
        say("Approved.")
    elif not same:
        say("Not approved; nothing was changed.")
        raise typer.Exit(1)
