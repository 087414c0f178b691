"""Look at runs while they work and afterwards, compare methods, and attack one's own training.

For ``fedbags runs``, ``status``, ``metrics``, ``track``, ``compare`` and ``audit``. Reads options and prints;
``audit`` writes audit.json. ``deploy.runs``, ``deploy.compare`` and ``deploy.audit`` do the work.
"""

import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError, writable
from common.files import write_json
from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports
from deploy.simulation import prerequisites

with lazy_imports():
    from rich import console, live

    from client import site as site_files
    from client.data import bags
    from common import config as run_config
    from deploy import configuration
    from deploy.audit import claim
    from deploy.cli import terminal
    from deploy.compare import run as comparison
    from deploy.runs import prometheus, reading, site_state, tracking
    from deploy.runs import show as finished

_AUDIT_FILE = "audit.json"
_EPSILON, _ROUNDS = 8.0, 8
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


def audit(
    run: Annotated[Path | None, typer.Argument(help="The folder of a private run.")] = None,
    sites_dir: Annotated[
        Path | None, typer.Option(help="Folder of site folders [default: the run's].")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Folder name of the site [default: the first].")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Without RUN: the claim to audit [default: {_EPSILON:g}].")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help=f"Rounds to train [default: the run's, else {_ROUNDS}].", min=1)
    ] = None,
    canaries: Annotated[
        int | None, typer.Option(help="Canary bags [default: enough to refute the claim, 100-400].", min=4)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeat an audit; fresh secure randomness without.", min=0)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for audit.json [default: RUN, else audit].")
    ] = None,
    json_: Json = False,
) -> None:
    """Attack private training on your own data, to test the claimed epsilon and see which labels leak.

    \b
    1. Canaries. Bags with the loudest gradients there can be are put among the site's, each by the toss of
       a coin, and the real private training runs once. Whoever guesses the coins right from the models
       too often refutes the claimed epsilon: `lower bound` (95% sure) must not be above `claimed`. Both are
       for adding or removing one bag, so the bound lies under the replace-one figure too. A bound under
       the claim does not prove the claim; it shows that this attack found no bug.
    2. Labels. Guess the leaf of the images of a bag: from proportions, exact and noised, and from models
       trained without and with privacy on half of the bags. Compare with the prior, which the public
       marginals give away, and with bags that the model never saw.

    It trains on the site's real bags, here, and sends nothing: no ledger is touched and no budget spent. But
    audit.json is computed from private data without noise. It is the site's own; share it on purpose.

    \b
    Examples:
      fedbags audit runs/private                           the run's settings, all its rounds
      fedbags audit --sites-dir SITES --epsilon 4 --json   before any run
    """
    config, folder = _settings(run, sites_dir, epsilon, rounds)
    prerequisites.check(config)

    sites = {path.name: path for path in site_files.site_folders(Path(config.sites_dir))}
    name = site or next(iter(sites))
    if name not in sites:
        raise UserError(f"no site {name!r} in {config.sites_dir}; there are {', '.join(sites)}")
    with terminal.counted(f"reading {name}") as progress:
        store = bags.BagStore.open(
            sites[name],
            config.model.image_size,
            features=config.model.feature_names,
            skip_bad=config.skip_bad,
            progress=progress,
        )
    with terminal.counted(f"auditing {name} (rounds)") as progress:
        result = claim.audit_site(config, store, canaries=canaries, seed=seed, progress=progress)
    path = (out or folder) / _AUDIT_FILE
    with writable(path, advice=""):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    if json_:
        print_json(result)
    else:
        _print_audit(result)
        say(f"written: {path}")
    if not result["holds"]:
        raise typer.Exit(1)


def _settings(
    run: Path | None, sites_dir: Path | None, epsilon: float | None, rounds: int | None
) -> tuple["run_config.RunConfig", Path]:
    """Return the configuration to audit, and the default folder of audit.json."""
    if run is None:
        if sites_dir is None:
            raise UserError("nothing to audit: give the folder of a private run, or --sites-dir")
        options: dict[str, run_config.Scalar] = {
            "sites-dir": str(sites_dir.resolve()),
            "dp.epsilon": _EPSILON if epsilon is None else epsilon,
            "rounds": rounds or _ROUNDS,
        }
        return configuration.compose(configuration.RunRequest(options)), Path("audit")
    if epsilon is not None:
        raise UserError("a run is audited for what it claimed; leave --epsilon out, or give no RUN")
    config = run_config.RunConfig.from_toml(run / "config.toml")
    if not config.dp.epsilon:
        raise UserError(f"{run} was not private, so it claims nothing: train with --dp epsilon=8")
    changes: dict[str, run_config.Scalar] = (
        {} if sites_dir is None else {"sites-dir": str(sites_dir.resolve())}
    )
    if rounds is not None:
        changes["rounds"] = rounds
    config = config.with_changes(changes)
    if not config.sites_dir:
        raise UserError(f"{run} does not say where its sites are: give --sites-dir")
    return config, run


def _print_audit(result: dict[str, Any]) -> None:
    """Print the verdict in a sentence, and the label attacks as a table."""
    out, claimed = terminal.console(), result["reported_epsilon"]
    verdict = "holds: not refuted" if result["holds"] else "REFUTED: the training leaks more than claimed"
    out.print(
        f"{result['site']}: {result['correct']} of {result['guesses']} guesses right about "
        f"{result['canaries']} canaries\nlower bound on epsilon: {result['lower_bound']:.3f} "
        f"({result['confidence']:.0%} sure, add/remove one bag, delta {result['delta']:g})\n"
        f"claimed: {claimed['add_remove']:.3f} (add/remove), {claimed['replace_one']:.3f} (replace-one)\n"
        f"verdict: {verdict}"
    )
    # With few canaries even perfect guesses stay below the claim, and then "holds" means nothing.
    if result["largest_possible_bound"] <= claimed["add_remove"]:
        out.print(
            f"This audit could not have failed: even perfect guesses prove only "
            f"{result['largest_possible_bound']:.3f}. Give more --canaries."
        )
    inference = result["label_inference"]
    proportions, models = inference["proportions"], inference["model"]
    rows = terminal.table(
        f"guessing the {inference['level']} of images", "from", "right", "over the prior", "unseen bags"
    )
    rows.add_row("prior (most frequent)", f"{proportions['prior']:.3f}", "", "")
    for title, key in (
        ("site counts, noised", "site_noised"),
        ("counts per bag, exact", "bags_exact"),
        ("counts per bag, noised", "bags_noised"),
    ):
        guessed = proportions[key]
        rows.add_row(title, f"{guessed['accuracy']:.3f}", f"{guessed['advantage']:+.3f}", "")
    for title, key in (("model without DP", "without_dp"), ("model with DP", "with_dp")):
        trained, advantage, unseen = (models[key][name] for name in ("trained", "advantage", "not_trained"))
        rows.add_row(title, f"{trained:.3f}", f"{advantage:+.3f}", f"{unseen:.3f}")
    out.print(rows)
    out.print(result["note"], style="dim")
