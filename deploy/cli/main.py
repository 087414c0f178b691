"""Define the ``fedbags`` command.

Each command reads its options and calls one function; nothing is computed here. What a command works with is
imported lazily (``deploy.lazy``), so that ``--help`` answers at once.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from common.errors import FedbagsError, UserError
from deploy import cli
from deploy.cli import Json, bags, consortium, ledger, parts, print_json, runs, say, site
from deploy.flower.processes import without_proxy
from deploy.lazy import lazy_imports
from deploy.simulation import interrupt, prerequisites

with lazy_imports():
    from common import config as run_config
    from deploy import configuration
    from deploy.cli import terminal
    from deploy.figures import draw
    from deploy.runs import predict as prediction
    from deploy.simulation import simulate as simulation

_HELP = """Train hierarchical image classifiers across hospitals that know only bag proportions.

\b
Start here:
  fedbags simulate                      five synthetic hospitals, under two minutes
  fedbags bags build --help             turn a folder of images into hospitals
  fedbags simulate --sites-dir SITES    train on them
  fedbags predict RUN IMAGE...          use the trained model
  fedbags compare SCENARIO --out DIR    methods side by side, to a table
"""

typer.core.HAS_RICH = False
"""Plain help: rich would double the time of --help, and typer escapes brackets for it in any case."""

app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
_site_app = typer.Typer(help="What one hospital holds, and what would leave it.", no_args_is_help=True)
app.add_typer(bags.app, name="bags")
app.add_typer(ledger.app, name="ledger")
app.add_typer(consortium.provision_app, name="provision")
app.add_typer(_site_app, name="site")
app.add_typer(runs.app, name="runs")
app.add_typer(parts.app, name="parts")

_site_app.command("approve")(site.approve)
app.command("compare")(runs.compare)
app.command("report")(ledger.report)
app.command("audit")(runs.audit)
app.command()(runs.status)
app.command()(runs.metrics)
app.command()(runs.track)
_site_app.command("keygen")(consortium.keygen)
_site_app.command("init")(site.init)
consortium.register(app, _site_app)
_site_app.command("check")(site.check)


def _print_version(asked: bool) -> None:
    if asked:
        import platform
        from importlib.metadata import version

        versions = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch"))
        say(f"fedbags {version('fedbags')} ({versions}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show versions.")
    ] = False,
) -> None:
    pass


class _Engine(StrEnum):
    """Name the engines that carry the messages of a simulation."""

    LOCAL = "local"
    FLOWER = "flower"


@app.command()
def simulate(
    sites: Annotated[int | None, typer.Option(help="Synthetic hospitals to draw.", min=1)] = None,
    sites_dir: Annotated[Path | None, typer.Option(help="Folder of site folders.")] = None,
    rounds: cli.Rounds = None,
    local_epochs: Annotated[int | None, typer.Option(help="Passes per round at a site.", min=1)] = None,
    method: Annotated[str | None, typer.Option(help="lhfglp, dllp, rot, ...: see docs/methods.md.")] = None,
    backbone: Annotated[str | None, typer.Option(help="resnet-small, or any torchvision model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes data, weights and order.", min=0)] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/NAME-TIME].")] = None,
    engine: Annotated[
        _Engine, typer.Option(help="Our own grid, or Flower's simulation runtime.")
    ] = _Engine.LOCAL,
    workers: Annotated[
        int | None, typer.Option(help="Processes (local engine) [default: cores].", min=0)
    ] = None,
    resume: cli.Resume = False,
    config: cli.ConfigFile = None,
    preset: cli.Presets = None,
    dp: cli.Dp = None,
    set_: cli.Settings = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Quarantine bad rows and go on.")] = False,
    figures: Annotated[bool, typer.Option(help="Draw the pictures at the end.")] = True,
    json_: Json = False,
) -> None:
    """Simulate hospitals on this machine with the same server and client apps as in a deployment.

    Without --sites-dir, draws synthetic hospitals. With it, picks the image size from the images. Stopped?
    The same command with --resume goes on from the last finished round.

    Example: fedbags simulate --sites-dir SITES --rounds 30 --set train.learning-rate=0.001 --out runs/first
    """
    options = {
        "federation.sites": sites,
        # Absolute, since Flower's processes have another working directory.
        "sites-dir": str(sites_dir.resolve()) if sites_dir else None,
        "rounds": rounds,
        "train.local-epochs": local_epochs,
        "model.method": method,
        "model.backbone": backbone,
        "seed": seed,
        "skip-bad": skip_bad or None,
    }
    # Only options that were given: a default here would win over the configuration file and the presets.
    given: dict[str, run_config.Scalar] = {key: value for key, value in options.items() if value is not None}
    given |= configuration.parse_dp(dp)
    summary = simulation.simulate(
        configuration.RunRequest(given, set_ or [], config, preset or [], out, resume),
        engine=engine.value,
        workers=workers,
        figures=figures,
        quiet=json_,
    )
    if json_:
        print_json(summary.to_dict())


@app.command("config")
def show_config(
    preset: Annotated[
        str | None,
        typer.Option(metavar="dp|sites-dir|METHOD", help="List the settings of a preset with their reasons."),
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="NAME", help="List the settings of a part: its keys parts.NAME.KEY.")
    ] = None,
    json_: Json = False,
) -> None:
    """List every configuration key with its default, bounds and meaning."""
    if preset:
        settings = configuration.preset_rows(preset)
        print_json(settings) if json_ else configuration.print_preset(settings, preset)
        return
    rows = configuration.config_rows(part)
    print_json(rows) if json_ else configuration.print_config(rows)


@app.command()
def predict(
    run: runs.RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images, DICOM files, folders.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a table, one image a line.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be read; they are listed.")
    ] = False,
    codes: Annotated[
        bool, typer.Option("--codes", help="Tell the strongest dictionary codes per level, too.")
    ] = False,
    top_codes: Annotated[int, typer.Option(help="How many, with --codes.", min=1)] = 3,
    json_: Json = False,
) -> None:
    """Classify images with a run's model into the best class of each level and the best path.

    Folders are searched at any depth. Images are read as for training; nothing is written without --csv.

    Example: fedbags predict runs/first IMAGES --csv predictions.csv --skip-bad
    """
    # Before torch is loaded: a missing model is named at once.
    prerequisites.require_model(run, csv)
    interrupt.at("before a prediction was written: give the same command again")

    with terminal.counted("predicting") as progress:
        found = prediction.predict_images(
            run, images, top_codes if codes else 0, skip_bad=skip_bad, progress=progress
        )
    for note in found.notes:
        say(f"note: {note}", err=True)
    for row in found.skipped:
        say(f"left out: {row}", err=True)
    if csv:
        prediction.write_csv(csv, found.rows)
        say(f"{len(found.rows)} image(s) predicted, {len(found.skipped)} left out: {csv}", err=True)
    if json_:
        print_json(found.rows)
    elif not csv:
        prediction.print_predictions(found.rows)


@app.command()
def figures(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to set side by side.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures [default: RUN/figures].")] = None,
    explainer: Annotated[
        str, typer.Option(metavar="NAME", help="The part that marks where a leaf is seen.")
    ] = "grad-cam",
    json_: Json = False,
) -> None:
    """Draw training curves, confusion matrices, a t-SNE of test bags, and activation maps.

    With several runs (plain pipeline, plain LLP, LHFGLP), t-SNE and activation maps stand side by side.
    """
    paths = draw.draw_figures(runs, out, explainer)
    if json_:
        print_json([str(path) for path in paths])
    else:
        for path in paths:
            say(path)


def main() -> None:
    """Run the command and exit with its status.

    The status is 0 for done, 1 for a run that failed, 2 for a mistake of the user, and 130 for Ctrl-C.
    """
    with interrupt.handled():
        # Before any command, because the processes that it starts inherit this environment.
        os.environ.update(without_proxy(os.environ))
        try:
            app()
        except UserError as error:
            say(f"error: {error}", err=True)
            sys.exit(2)
        except FedbagsError as error:
            say(f"the run failed: {error}", err=True)
            sys.exit(1)
        except ModuleNotFoundError as error:
            # A missing module of an extra is the user's to install. Any other is a fault to be seen in full.
            if not (advice := prerequisites.missing_extra(error.name)):
                raise
            say(f"error: {advice}", err=True)
            sys.exit(2)


if __name__ == "__main__":
    main()
