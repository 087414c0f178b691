"""Write, check and approve what one hospital runs on.

For ``fedbags site init``, ``check`` and ``approve``; the others of ``fedbags site`` are in
``deploy.cli.consortium``.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from common.errors import UserError, writable
from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports

with lazy_imports():
    from client import site as site_file
    from client.data import tables
    from common import config as run_config
    from common import settings_file
    from deploy.consortium import app as apps
    from deploy.consortium import kit as kit_folder
    from deploy.datasets import site_check

_RELEASES = ("none", "total", "per-bag")


def init(
    site: Annotated[Path, typer.Argument(help="The site's folder; made if missing.")],
    name: Annotated[str | None, typer.Option(help="Name of the site [default: the folder's].")] = None,
    hierarchy: Annotated[str | None, typer.Option(help="File of the label tree, in the folder.")] = None,
    minimum_bag_size: Annotated[int | None, typer.Option(help="Images; smaller bags are refused.")] = None,
    release_proportions: Annotated[
        str | None, typer.Option(help="Label counts that leave: none, total or per-bag.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="The most that may ever be spent; private runs only.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="The delta of the budget.")] = None,
    secure_aggregation: Annotated[
        bool | None,
        typer.Option(
            "--secure-aggregation/--no-secure-aggregation", help="Never send an update in clear, or do."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of [policy]; metrics by commas."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Change a site.toml that is there; what is not named is kept.")
    ] = False,
    image_size: Annotated[int, typer.Option(help="For the check: side of the input, pixels.", min=8)] = 48,
    json_: Annotated[bool, typer.Option("--json", help="Ask nothing; print the check as JSON.")] = False,
) -> None:
    """Write a hospital's site.toml, then show what would leave.

    The values are asked for on a terminal, or come from the options.

    Example: fedbags site init SITES/hospital-1 --release-proportions total --epsilon 8 --delta 1e-4
    """
    target = site / site_file.SITE_FILE
    if target.exists() and not force:
        raise UserError(f"{target} exists already; change it with --force")
    base = site_file.SiteConfig.load(site).model_dump(mode="json", by_alias=True) if target.exists() else {}
    given: dict[str, Any] = {
        "name": name,
        "hierarchy": hierarchy,
        "policy.minimum-bag-size": minimum_bag_size,
        "policy.release-proportions": release_proportions,
        "policy.budget.epsilon": epsilon,
        "policy.budget.delta": delta,
        "policy.secure-aggregation.required": secure_aggregation,
    }
    for key, value in map(run_config.parse_setting, set_ or []):
        listed = isinstance(value, str) and key.split(".")[-1] == "metrics"
        given[f"policy.{key}"] = str(value).split(",") if listed else value
    if not json_ and _on_terminal():
        _ask(given, base, site.resolve().name)
    config = _compose(base, given, site.resolve().name)
    if config.policy.budget.delta is not None and config.policy.budget.epsilon is None:
        raise UserError("a budget has an epsilon: give --epsilon too")
    with writable(target, advice=""):
        site.mkdir(parents=True, exist_ok=True)
        config.save(site)
    missing = [
        file
        for file in (tables.MANIFEST_FILE, tables.BAGS_FILE, config.hierarchy)
        if not (site / file).exists()
    ]
    if not json_:
        say(f"wrote {target}")
    if missing:
        result = {"site": config.name, "written": str(target), "missing": missing}
        advice = (
            f"Still missing: {', '.join(missing)} (docs/data.md); then look at `fedbags site check {site}`."
        )
        if json_:
            print_json(result)
        else:
            say(advice)
        return
    _show(site_check.check_site(site, image_size), json_)


def check(
    site: Annotated[Path, typer.Argument(help="A site folder (with site.toml).")],
    image_size: Annotated[int, typer.Option(help="Side of the square input, pixels.", min=8)] = 48,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Quarantine bad rows and go on.")] = False,
    json_: Json = False,
) -> None:
    """Check a site's data, and show exactly what would leave the site."""
    _show(site_check.check_site(site, image_size, skip_bad=skip_bad), json_)


def _show(checked: dict[str, Any], json_: bool) -> None:
    if json_:
        print_json(checked)
    else:
        site_check.print_check(checked)


def _on_terminal() -> bool:
    """Return whether somebody is there to answer."""
    # The questions are printed on standard error, so that standard output holds results only.
    return sys.stdin.isatty() and sys.stderr.isatty()


def _compose(base: dict[str, Any], given: dict[str, Any], folder: str) -> "site_file.SiteConfig":
    """Return the site's configuration from the given values, else the old file, else the defaults.

    Args:
        base: the old site.toml, nested; empty if there was none.
        given: dotted keys; None where no value was given.
        folder: the folder's name, which is the site's name unless one is given.

    Raises:
        ConfigError: a key is unknown or its value out of range; every one is named.
        UserError: a key names a table inside something that is none.
    """
    # A deep copy, because the nested tables are changed below.
    data: dict[str, Any] = json.loads(json.dumps(base)) or {"name": folder}
    for dotted, value in given.items():
        if value is None:
            continue
        *path, last = dotted.split(".")
        table = data
        for key in path:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise UserError(f"{dotted}: {key!r} is no table of site.toml")
        table[last] = value
    return settings_file.validated(site_file.SiteConfig, data, f"the {site_file.SITE_FILE} asked for")


def _ask(given: dict[str, Any], base: dict[str, Any], folder: str) -> None:
    """Ask for what was not given, offering the old or usual value in brackets."""
    policy = base.get("policy", {})
    budget = policy.get("budget", {})
    required = policy.get("secure-aggregation", {}).get("required", True)

    def ask(key: str, question: str, usual: Any, **options: Any) -> None:
        if given[key] is None:
            given[key] = typer.prompt(question, default=usual, err=True, **options)

    ask("name", "Name of the site, as the coordinator knows it", base.get("name", folder))
    ask("policy.minimum-bag-size", "Smallest bag, in images", policy.get("minimum-bag-size", 4), type=int)
    ask(
        "policy.release-proportions",
        "Label counts that leave",
        policy.get("release-proportions", "total"),
        type=click.Choice(_RELEASES),
    )
    if given["policy.budget.epsilon"] is None:
        question = "Privacy budget, epsilon (0: none, and runs without differential privacy are taken)"
        epsilon = typer.prompt(question, default=budget.get("epsilon") or 0.0, type=float, err=True)
        given["policy.budget.epsilon"] = epsilon or None
        if not epsilon:
            # A value that is not given is kept, and this answer asks for no budget.
            policy.pop("budget", None)
    if given["policy.budget.epsilon"] is not None:
        ask("policy.budget.delta", "Delta of the budget", budget.get("delta") or 1e-4, type=float)
    if given["policy.secure-aggregation.required"] is None:
        question = "Send updates only masked, so that the server sees sums of several sites?"
        given["policy.secure-aggregation.required"] = typer.confirm(question, default=required, err=True)


def approve(
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
    changes = apps.compare_apps(old, new)
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
        print_json(answer | {"changes": changes.to_json()})
    elif approve and not same:
        say("Approved.")
    elif not same:
        say("Not approved; nothing was changed.")
        raise typer.Exit(1)
