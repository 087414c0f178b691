"""Define the ServerApp, which enrols the sites, runs the rounds and saves the selected model."""

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import RunError, UserError
from common.model.build import build_model, trainable_parameters
from common.model.model_file import ModelCard, load_arrays, save_model
from common.parts import provenance
from common.run_records import CheckpointDamaged, Enrolled, Failed, Finished, RunSummary, SiteFigures
from server import run_folder
from server.collect import Collector
from server.enrolment import Quorum, RoundCohort
from server.evaluation import (
    Confusion,
    accuracy_bounds,
    add_up,
    confusions,
    level_figures,
    shown,
    smallest_cell,
)
from server.rounds import Rounds
from server.run_folder import RunFolder, ServerState, code_version

log = logging.getLogger("fedbags.server")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation to its end.

    The files that it leaves are described in run_folder.py.
    """
    config = RunConfig.from_flat(context.run_config)
    folder = RunFolder(_run_path(config, context.run_id))
    folder.open(config)
    handler = folder.log_handler()
    logger = logging.getLogger("fedbags")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    code = code_version()  # now: a checkout may move on while the run goes on with what was loaded
    try:
        rounds = _begin(grid, config, folder)
        rounds.run()
        _finish(rounds, code)
    except RunError as error:
        # The disk may be what failed: then this event fails too, and the first error is the one to tell.
        with contextlib.suppress(RunError):
            folder.record(Failed(reason=str(error)))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def _run_path(config: RunConfig, run_id: int) -> Path:
    """Return the run folder.

    It is ``run-dir``, or a folder named after the run below the user's home.
    """
    if config.run_dir:
        return Path(config.run_dir)
    return Path.home() / ".fedbags" / "runs" / f"{config.name}-{run_id}"


def _begin(grid: Grid, config: RunConfig, folder: RunFolder) -> Rounds:
    """Enrol the sites and build the model, or restore both from the newest checkpoint.

    Raises:
        RunError: fewer accepted sites than the quorum, or no intact checkpoint.
    """
    damaged: list[dict[str, str]] = []
    found = None
    if config.resume:
        found = run_folder.newest_checkpoint(
            folder.checkpoints, lambda file, reason: damaged.append({"file": file, "reason": reason})
        )
    state, groups = found if found is not None else (ServerState(), None)
    # The events of rounds after the checkpoint will be written again, and twice they would count twice.
    folder.forget_events_after(state.round)
    for checkpoint_file in damaged:
        folder.record(CheckpointDamaged(round=state.round, **checkpoint_file))
    quorum = Quorum(grid, config.attendance, folder, state)
    quorum.wait_for_all()
    RoundCohort(quorum, state.round + 1).sites()
    assert quorum.roster.hierarchy is not None  # the quorum is at least one site
    model = build_model(config.model, quorum.roster.hierarchy, config.seed, config.parts)
    trainable_parameters(model, config.trained_part)
    rounds = Rounds(Collector(config, quorum), model)
    if groups is not None:
        rounds.restore(groups)
    folder.record(
        Enrolled(
            event="resumed" if groups is not None else "enrolled",
            round=state.round,
            rounds=config.rounds,
            sites=quorum.roster.names(),
        )
    )
    return rounds


def _finish(rounds: Rounds, code: Mapping[str, str | None]) -> None:
    """Test the selected model, save it, and write the summary.

    ``code`` identifies the code that ran (see ``run_folder.code_version``).
    """
    started = time.monotonic()
    state, folder, config = rounds.state, rounds.folder, rounds.config
    load_arrays(rounds.model, rounds.best)
    card = ModelCard.describe(config.model, rounds.model.hierarchy, state.best_round, config.parts)
    try:
        save_model(folder.path, rounds.model, card)
    except UserError as error:
        raise RunError(f"{error}\nThe last checkpoint is intact: go on with --resume.") from error
    counts, smallest = _confusion_counts(rounds)
    tree = rounds.model.hierarchy
    bounds = accuracy_bounds(tree, list(counts.values()), list(smallest.values()))
    site_bounds = {site: accuracy_bounds(tree, [counts[site]], [smallest[site]]) for site in counts}
    # The bounds above need the marks of suppressed counts; sums and pictures must not add up -1.
    counts = {site: (shown(argmax), shown(path)) for site, (argmax, path) in counts.items()}
    per_site = {site: level_figures(tree, *pair, site_bounds[site]) for site, pair in counts.items()}
    pooled = add_up(list(counts.values())) if counts else None
    if pooled:
        folder.write_confusion(*pooled)
    state.seconds += time.monotonic() - started
    releases, statements = sorted(rounds.roster.releases.items()), sorted(state.statements.items())
    kept = {"data_version", "mechanism", "granularity", "bags", "event"}
    folder.write_summary(
        RunSummary(
            name=config.name,
            method=config.model.method,
            rounds=state.round,
            selected_round=state.best_round,
            stopped_early=state.stopped_early or None,
            sites=len(rounds.roster.nodes),
            seconds=round(state.seconds, 3),
            code=code,
            parts=provenance([*config.part_names, config.federation.strategy]),
            engine=getattr(rounds.collector.grid, "engine", "flower"),  # our own grid names itself
            levels=level_figures(tree, *pooled, bounds) if pooled else [],
            bags=state.bags,
            per_site={
                site: SiteFigures(
                    bags=release.bags,
                    release=release.mechanism,
                    epsilon=state.statements[site].epsilon if site in state.statements else None,
                    levels=per_site.get(site, []),
                )
                for site, release in releases
            },
            statements={site: statement.model_dump(mode="json") for site, statement in statements},
            releases={site: release.model_dump(mode="json", include=kept) for site, release in releases},
            losses=state.losses,
            left_out=state.left_out,
        )
    )
    folder.record(Finished(round=state.round, seconds=state.seconds))


def _confusion_counts(rounds: Rounds) -> tuple[dict[str, tuple[Confusion, Confusion]], dict[str, int]]:
    """Return the selected model's confusion counts (argmax, path) and the least count shown, by site.

    Sites without any are absent.
    """
    tree = rounds.model.hierarchy
    counts, smallest = {}, {}
    for site, update in rounds.evaluate_test().items():
        argmax, path = (confusions(update, tree, decoder) for decoder in ("argmax", "path"))
        if argmax is not None and path is not None:
            counts[site] = (argmax, path)
            smallest[site] = smallest_cell(update)
    return counts, smallest
