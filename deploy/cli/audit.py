"""Attack the private training on one's own data, for ``fedbags audit``.

Reads options, writes audit.json and prints. ``deploy.audit`` does the work.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError, writable
from common.files import write_json
from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports
from deploy.simulation import prerequisites

with lazy_imports():
    from client import site as site_files
    from client.data import bags
    from common import config as run_config
    from deploy import configuration
    from deploy.audit import claim
    from deploy.cli import terminal

_AUDIT_FILE = "audit.json"
_EPSILON, _ROUNDS = 8.0, 8


def audit_command(
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
            sites[name], config.model.image_size, skip_bad=config.skip_bad, progress=progress
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
