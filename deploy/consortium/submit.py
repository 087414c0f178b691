"""Start the kit's own app at its SuperLink, show the rounds, and end as the run ended.

This is ``fedbags run``. The bytes of the app are those whose hash the sites approved. The ServerApp runs on
this machine, so its run folder is read directly.
"""

import io
import signal
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import typer

from common.config import RunConfig, Scalar, flatten
from common.errors import RunError, UserError
from common.run_records import Failed, RunSummary
from deploy.cli import say
from deploy.cli.terminal import Follower, console
from deploy.configuration import RunRequest, compose, say_presets
from deploy.consortium.checks import check_bundle
from deploy.consortium.control import Control, RunStatus, control
from deploy.consortium.kit import CoordinatorKit
from deploy.lazy import lazy_imports
from deploy.runs.reading import read_summary, run_events
from deploy.runs.show import print_summary
from deploy.simulation import prerequisites
from server.run_folder import RunFolder

# It brings torch along, which only private runs need here.
with lazy_imports():
    from client import private_check
    from server import aggregation

_POLL, _OUTAGE = 0.5, 300.0
COMPLETED, _STOPPED = "completed", "stopped"


def run(kit: CoordinatorKit, request: RunRequest, *, ask: bool = True, quiet: bool = False) -> RunSummary:
    """Run one federation with the sites that are connected.

    Args:
        kit: the coordinator's.
        request: what to run.
        ask: whether Ctrl-C asks before it stops the run (a terminal is there to answer).
        quiet: no tables on standard output.

    Returns:
        The content of summary.json.

    Raises:
        UserError: faulty options; nothing was started.
        RunError: the run failed, or was stopped.
    """
    check_bundle(kit)
    config = _configuration(kit, request)
    folder = RunFolder(Path(config.run_dir))
    folder.check(config)
    _link_among_runs(kit, folder.path)
    with control(kit) as api, _interrupts() as interrupted:
        # The stored bytes and no new bundle: these have the hash that the sites approved.
        app = kit.app.read_bytes()
        run_id = api.start_run(app, changes(app, config))
        say(f"run {run_id} of consortium {kit.consortium}: {folder.path}", err=True)
        while True:
            with Follower(folder.metrics, config.rounds):
                status = wait_for_end(api, run_id, interrupted)
            if status.finished:
                return _outcome(folder.path, run_id, status, quiet=quiet)
            if not ask or _confirmed(run_id):
                say(f"stopping run {run_id}", err=True)
                api.stop_run(run_id)
            interrupted.clear()


def _configuration(kit: CoordinatorKit, request: RunRequest) -> RunConfig:
    request = request.with_its_configuration()
    config = compose(replace(request, options=_expected_sites(kit, request.options, request.config_file)))
    say_presets(config, request)
    # Absolute, because the ServerApp has another working directory.
    path = (request.out or kit.runs / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    here: dict[str, Scalar] = {"run-dir": str(path), "resume": request.resume}
    if not config.federation.statements:
        here["federation.statements"] = str(kit.statements)
    if config.secure_aggregation.enabled and not config.secure_aggregation.certificates:
        here["secure-aggregation.certificates"] = str(kit.nodes)
    prerequisites.check_coordinator(config)
    private_check.refuse_unsound_run(config)
    aggregation.build_optimiser(config)
    return config.with_changes(here)


def _link_among_runs(kit: CoordinatorKit, run: Path) -> None:
    """Link a run folder that lies elsewhere among the kit's runs, where status and /metrics find it."""
    if run.parent == kit.runs:
        return
    kit.runs.mkdir(parents=True, exist_ok=True)
    link = kit.runs / run.name
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(run)


def _expected_sites(
    kit: CoordinatorKit, options: Mapping[str, Scalar], config_file: Path | None
) -> Mapping[str, Scalar]:
    """Return the options, completed by the number of sites to wait for.

    Where neither the options nor a file name the number, all sites that have a key are waited for.

    Raises:
        UserError: no site has a key yet.
    """
    sites = len(kit.registered_sites)
    if not sites:
        raise UserError(
            f"no site of {kit.consortium} has a key yet: `fedbags provision add-key KITS SITE node.pub`"
        )
    return options if config_file else {"federation.sites": sites, **options}


def changes(app: bytes, config: RunConfig) -> Mapping[str, Scalar]:
    """Return the keys of a configuration that differ from the app's own, with which a run is started.

    Raises:
        UserError: the app, which may be older than this fedbags, does not know one of them.
    """
    with zipfile.ZipFile(io.BytesIO(app)) as bundle:
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    own = flatten(project["tool"]["flwr"]["app"]["config"])
    usual = {**RunConfig(model=config.model).to_flat(), **RunConfig().to_flat()}
    wanted = config.to_flat()
    # An app that is older than this fedbags still runs, as long as only keys that it knows are set.
    unknown = [key for key in wanted if key not in own and wanted[key] != usual[key]]
    if unknown:
        raise UserError(
            f"the app that the sites approved does not know {', '.join(unknown)}: leave it out, or let them "
            "approve a newer app (`fedbags provision update-app KITS`, then `fedbags site approve`)"
        )
    return {key: value for key, value in wanted.items() if key in own and value != own[key]}


def wait_for_end(api: Control, run_id: int, interrupted: Event) -> RunStatus:
    """Poll until the run has finished, or until the user interrupts.

    A SuperLink that is away is waited for: its service manager may start it again.

    Raises:
        RunError: the SuperLink was away for OUTAGE seconds.
    """
    away_since: float | None = None
    while True:
        try:
            status = api.run_status(run_id)
            away_since = None
        except RunError:
            now = time.monotonic()
            away_since = now if away_since is None else away_since
            if now - away_since > _OUTAGE:
                raise
        else:
            if status.finished or interrupted.is_set():
                return status
        time.sleep(_POLL)


def _outcome(path: Path, run_id: int, status: RunStatus, *, quiet: bool) -> RunSummary:
    """Return the summary of a completed run.

    Raises:
        RunError: it was stopped, or failed; carries the ServerApp's reason, and where its log is.
    """
    if status.outcome == _STOPPED:
        raise RunError(
            f"run {run_id} was stopped. Its last finished round is kept: go on with --resume --out {path}"
        )
    if status.outcome != COMPLETED:
        reason = _last_failure(path) or status.details or "Flower gives no reason"
        raise RunError(
            f"run {run_id} {status.outcome}: {reason}\n"
            f"Its log is {path / 'log.jsonl'}, that of its process logs/superexec.log in the kit."
        )
    summary = read_summary(path)
    if not quiet:
        print_summary(summary, path)
        console().print(f"run folder: {path}", soft_wrap=True)
    return summary


def _last_failure(path: Path) -> str:
    """Return the reason that the ServerApp recorded for its failure, or an empty text."""
    reasons = [event.reason for event in run_events(path) if isinstance(event, Failed)]
    return reasons[-1] if reasons else ""


@contextmanager
def _interrupts() -> Iterator[Event]:
    """Yield an event that Ctrl-C (or SIGTERM) sets instead of ending this program."""
    # The run goes on at the server whatever ends here, so the user is asked what an interruption means.
    happened = Event()
    before = {
        sign: signal.signal(sign, lambda _sign, _frame: happened.set())
        for sign in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield happened
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _confirmed(run_id: int) -> bool:
    """Ask whether to stop the run at all sites, and take another Ctrl-C for a yes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return typer.confirm(f"Stop run {run_id} at the server and at every site?", err=True)
    except (KeyboardInterrupt, typer.Abort):
        return True
    finally:
        signal.signal(signal.SIGINT, before)
