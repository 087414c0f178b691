"""Run a simulation from its options to its summary, for ``fedbags simulate``.

Prepares the sites, runs one engine and shows the outcome. For secure aggregation the simulated sites get an
ephemeral PKI: an authority, and a kit with key and certificate for each site. No real site uses it. All
simulated sites live on one machine, so there is nobody to hide from; but the protocol that a real deployment
runs is then run too, certificates and signatures included. The authority's key is kept with the certificates,
unprotected.
"""

import logging
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import RunConfig
from common.files import write_bytes
from common.hierarchy import Hierarchy
from common.run_records import RunSummary
from deploy.cli.terminal import Follower, console, counted
from deploy.configuration import RunRequest, compose, say_presets
from deploy.datasets.options import SyntheticHospitals
from deploy.lazy import lazy_imports
from deploy.runs.reading import read_summary, run_events
from deploy.runs.show import print_summary
from deploy.simulation import interrupt, prerequisites
from deploy.simulation.prerequisites import locked

# They bring torch along, which the checks of the options do not need.
with lazy_imports():
    from client import budget, private_check, secure_aggregation, session
    from client import site as site_files
    from client.data import bags, labelled
    from common.model import build
    from common.privacy import randomness
    from deploy.consortium import pki
    from deploy.datasets import build as datasets
    from deploy.figures import draw as figures_of_runs
    from deploy.report import files as budget_report
    from deploy.simulation import flower_engine, local_grid
    from server import aggregation, run_folder
    from server import app as server_app

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_LOCK_SECONDS = 0.5
"""How long to wait for a run that was just stopped to let go of its folder."""
_AUTHORITY_KEY, _CONSORTIUM, _VALID_DAYS = "ca.key", "simulation", 3650
"""Of an ephemeral PKI."""


def simulate(
    request: RunRequest,
    *,
    engine: str = "local",
    workers: int | None = None,
    figures: bool = True,
    quiet: bool = False,
) -> RunSummary:
    """Run one simulation from its options to its summary.

    Args:
        request: what to run; in ``runs/NAME-TIME`` if it names no folder.
        engine: ``local`` or ``flower``.
        workers: worker processes of the local engine; as many as cores when None, 0 for none.
        figures: draw the pictures at the end, and write the privacy-budget report of a private run.
        quiet: no tables on standard output (progress goes to standard error anyway).

    Returns:
        The content of summary.json.

    Raises:
        UserError: faulty options or data; nothing was started.
        RunError: the run failed.
    """
    request = request.with_its_configuration()
    config = compose(request)
    prerequisites.check(config)
    shown = request.out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.with_changes({"run-dir": str(shown.resolve()), "resume": request.resume})
    folder = run_folder.RunFolder(shown.resolve())
    again = f"fedbags simulate --out {shlex.quote(str(shown))} --resume" + (
        f" --engine {engine}" if engine != "local" else ""
    )
    say_presets(config, request)
    # A function, because how far the run has come is read only when Ctrl-C comes.
    interrupt.at(lambda: _whereabouts(folder, config.rounds, again))
    with locked(folder.path, "a run", _LOCK_SECONDS):
        folder.check(config)
        try:
            summary = _run_prepared(config, folder, engine, workers)
        except BaseException:
            # The run never began, so the sites that were drawn for it go as well.
            if not folder.config.exists():
                shutil.rmtree(folder.path / "sites", ignore_errors=True)
            raise
        if figures:
            _draw(config, folder)
    if not quiet:
        print_summary(summary, folder.path)
        console().print(f"run folder: {folder.path}", soft_wrap=True)
    return summary


def _run_prepared(
    config: RunConfig, folder: "run_folder.RunFolder", engine: str, workers: int | None
) -> RunSummary:
    """Draw or check the sites, run the engine, and return the summary.

    Raises:
        FedbagsError: as ``simulate``.
    """
    # Before the sites are drawn and read, which takes longer.
    check_model(config)
    sites_dir = Path(config.sites_dir) if config.sites_dir else _synthetic_sites(config, folder)
    sites = site_files.site_folders(sites_dir)
    config = config.with_changes({"sites-dir": str(sites_dir), "federation.sites": len(sites)})
    images = _prepare_sites(sites, config)
    named = "1 site" if len(sites) == 1 else f"{len(sites)} sites"
    _say(f"{named}, {images} training images, {config.model.image_size} px, {config.rounds} rounds")
    with Follower(folder.metrics, config.rounds):
        run_engine(config, engine, _default_workers(len(sites)) if workers is None else workers)
    return read_summary(folder.path)


def _synthetic_sites(config: RunConfig, folder: "run_folder.RunFolder") -> Path:
    """Draw the synthetic hospitals of a new run, and return their folder.

    Raises:
        UserError: the folder exists, and not from a run that could be resumed.
    """
    sites_dir = folder.path / "sites"
    if folder.config.exists() and sites_dir.exists():
        return sites_dir
    with counted("drawing synthetic hospitals") as progress:
        hospitals = SyntheticHospitals(
            config.federation.sites, config.seed, image_size=config.model.image_size
        )
        datasets.write_synthetic_sites(sites_dir, hospitals, progress)
    return sites_dir


def _draw(config: RunConfig, folder: "run_folder.RunFolder") -> None:
    """Draw the pictures of a finished run, and write the privacy-budget report of a private one."""
    figures_of_runs.draw_figures([folder.path], None)
    if config.dp.epsilon:
        budget_report.report([folder.path], folder.path / "report")


def _whereabouts(folder: "run_folder.RunFolder", rounds: int, again: str) -> str:
    """Describe how far a run has come, with the command that goes on with it."""
    if folder.summary.exists():
        run = shlex.quote(str(folder.path))
        return f"after the run was complete: see `fedbags runs show {run}`, `fedbags figures {run}`"
    if not folder.config.exists():
        return "before the first round, and nothing was trained: give the same command again"
    done = max((event.round for event in run_events(folder.path)), default=0)
    where = f"in round {done + 1} of {rounds}" if done < rounds else "while the model was tested"
    return f"{where}: go on with `{again}`"


def _prepare_sites(sites: Sequence[Path], config: RunConfig) -> int:
    """Check and decode every site's images before anything starts, and return the number in use.

    Raises:
        DataError: the bad rows of a site (here they may be shown: site and user are the same).
    """
    used = 0
    for site in sites:
        with counted(f"reading {site.name}") as progress:
            size, features, skip = config.model.image_size, config.model.feature_names, config.skip_bad
            store = bags.BagStore.open(site, size, features=features, skip_bad=skip, progress=progress)
            labelled.LabelledImages.open(site, size, features=features, skip_bad=skip, progress=progress)
        if config.dp.epsilon:
            _check_plan(config, store, site)
        summary = store.summary
        used += summary.used
        if summary.quarantined or summary.converted:
            _say(
                f"{site.name}: {summary.used} of {summary.listed} images used, "
                f"{summary.quarantined} quarantined, {summary.converted} converted to RGB"
            )
    return used


def check_model(config: RunConfig) -> None:
    """Build the model once, so that unknown or unsound parts and unusable weights are found before the run.

    Raises:
        UserError: see build_model, refuse_unsound_run and build_optimiser.
    """
    tree = Hierarchy.from_rows(["leaf"], [["a"], ["b"]])
    build.build_model(config.model, tree, config.seed, config.parts)
    private_check.refuse_unsound_run(config)
    aggregation.build_optimiser(config)


def _check_plan(config: RunConfig, store: "bags.BagStore", site: Path) -> None:
    """Make a site's privacy plan before the run, so that a faulty setting is found at once, and keep it.

    Raises:
        UserError: the settings make no plan for this site.
    """
    # The noise multiplier is kept where the site looks for it, so that it is searched for once. No noise is
    # drawn from this source.
    source = randomness.InsecureSeededRandomness(config.seed, store.name)
    terms = store.config.policy.terms(simulated=True)
    divided = session.with_own_split(store, site, terms, private=True)
    plan = budget.make_plan(config, divided, source, budget.SigmaCache(site / bags.CACHE_FOLDER))
    _say(
        f"{store.name}: {plan.number_of_bags} bags, sample rate {plan.sample_rate:.3f}, noise multiplier "
        f"{plan.noise_multiplier:.3f} for epsilon {plan.planned_epsilon:.3f} (replace-one bag, delta "
        f"{plan.delta:g})"
    )


def run_engine(config: RunConfig, engine: str, workers: int) -> None:
    """Run ServerApp and ClientApps to the end.

    Raises:
        RunError: the run failed; what the server said.
    """
    if config.secure_aggregation.enabled:
        make_ephemeral_pki(config)
    if engine == "flower":
        flower_engine.run_flower(config)
        return

    serve = server_app.app
    # Flower's strategies report each aggregation, of our one mean reply: noise between progress bars. Flower
    # sets its logger up when it is imported, as by the line above, so it is told to be quiet after that.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # The log.jsonl of the run folder has these lines.
    logging.getLogger("fedbags").propagate = False
    flat = config.to_flat()
    with local_grid.LocalGrid(config.federation.sites, flat, workers) as grid:
        serve(grid, grid.server_context(flat))


def _default_workers(sites: int) -> int:
    """Return as many processes as cores, but not more than sites."""
    return max(1, min(os.cpu_count() or 1, sites))


def _say(text: str) -> None:
    """Print one line for the person at the terminal, on standard error."""
    console(stderr=True).print(text)


def make_ephemeral_pki(config: RunConfig) -> None:
    """Make the kits that the sites of a simulation need for secure aggregation, in its run folder."""
    for folder in site_files.site_folders(Path(config.sites_dir)):
        _ephemeral_kit(Path(config.run_dir), site_files.SiteConfig.load(folder).name)


def _ephemeral_kit(run: Path, site: str) -> Path:
    """Return the kit folder of a simulated site with node.key, node.crt and ca.crt, made if it is missing.

    Args:
        run: the run folder, which all simulated sites share.
        site: the site's name.
    """
    root = run / secure_aggregation.EPHEMERAL
    kit, authority = root / site, root / secure_aggregation.CA_FILE
    if not authority.exists():
        root.mkdir(parents=True, exist_ok=True)
        key = _new_key(root / _AUTHORITY_KEY)
        name = pki.distinguished_name(_CONSORTIUM, "ephemeral authority")
        builder = pki.certificate_builder(name, key.public_key(), _VALID_DAYS)
        pki.write_certificate(authority, pki.sign_certificate(builder, key, authority=True))
    certificate = kit / secure_aggregation.CERTIFICATE_FILE
    if not certificate.exists():
        kit.mkdir(exist_ok=True)
        issuer, signer = pki.read_certificate(authority), pki.read_private_key(root / _AUTHORITY_KEY)
        key = _new_key(kit / secure_aggregation.KEY_FILE)
        name = pki.distinguished_name(_CONSORTIUM, site)
        builder = pki.certificate_builder(name, key.public_key(), _VALID_DAYS, issuer)
        write_bytes(kit / secure_aggregation.CA_FILE, authority.read_bytes(), 0o600)
        pki.write_certificate(certificate, pki.sign_certificate(builder, signer, authority=False))
    return kit


def _new_key(path: Path) -> "ec.EllipticCurvePrivateKey":
    # A key whose certificate is missing was left by a run that was killed in between.
    path.unlink(missing_ok=True)
    return pki.make_private_key(path, pki.KeyForm.PKCS8)
