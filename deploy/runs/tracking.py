"""Mirror a run's figures into TensorBoard and MLflow, while it goes on or afterwards.

The events of the run are the only source, so an import of a finished run gives the same curves as following
it. It needs the extra ``tracking``. Paths in the configuration are not mirrored.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from common.config import RunConfig
from common.errors import RunError, UserError, writable
from common.run_records import BagsEvaluated, Exchanged, RoundDone, RunEvent, Stated, UpdateTaken
from deploy.runs.reading import EventsFile, RunState, Stage
from server.run_folder import RunFolder

_INTERVAL = 1.0
"""Seconds between two looks at a run that goes on."""
_PATHS = frozenset(
    {"run-dir", "sites-dir", "model.weights", "federation.statements", "secure-aggregation.certificates"}
)
"""Keys of the configuration that hold paths of this machine."""
_EXPERIMENT = "fedbags"


class _Mirror(Protocol):
    """Receive the figures of a run."""

    def figures(self, round: int, at: float, values: Mapping[str, float]) -> None:
        """Take figures of a round, from ``at`` (seconds since 1970)."""

    def flush(self) -> None:
        """Make what was taken visible to readers."""

    def end(self, stage: Stage, at: float) -> None:
        """Record that the run ended in this stage."""

    def close(self) -> None:
        """Release everything, whether the run has ended or not."""


def _figures_of(event: RunEvent, state: RunState) -> dict[str, float]:
    """Return the figures of an event by name, where ``state`` is the run's state after it."""
    values: dict[str, float | None] = {}
    match event:
        case RoundDone():
            values = {
                "loss": event.loss,
                "updates": event.updates,
                "sites/in": state.count(taking_part=True),
                "sites/out": state.count(taking_part=False),
            }
        case BagsEvaluated():
            values = {"held-back/score": event.score}
            for level in event.levels:
                values |= {f"held-back/{level.level}/kl": level.kl, f"held-back/{level.level}/l1": level.l1}
        case Exchanged():
            values = {
                f"seconds/{event.phase}": event.seconds,
                f"bytes_sent/{event.phase}": event.bytes_sent,
                f"bytes_received/{event.phase}": event.bytes_received,
            }
        case UpdateTaken():
            values = {f"site/{event.site}/loss": event.loss}
        case Stated():
            values = {
                f"site/{event.site}/epsilon-spent": event.epsilon,
                f"site/{event.site}/epsilon-left": event.budget_left,
            }
    return {name: float(value) for name, value in values.items() if value is not None}


class _TensorBoard:
    """Write event files below ``folder``, one folder per run."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing_extra("--tensorboard", error) from error
        with writable(folder, advice=""):
            self._writer: Any = SummaryWriter(folder / run)
        lines = "\n".join(f"    {key} = {value!r}" for key, value in config.items())
        self._writer.add_text("configuration", lines)

    def figures(self, round: int, at: float, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round, walltime=at)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()

    def end(self, stage: Stage, at: float) -> None:
        """Record as text the stage that the run ended in."""
        self._writer.add_text("stage", stage.value, walltime=at)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class _MLflow:
    """Write a new run on a tracking server, or in a local store (``sqlite:///FILE``, ``file:FOLDER``)."""

    def __init__(self, url: str, run: str, config: Mapping[str, Any], started: float) -> None:
        # MLflow reports its use to its makers unless told otherwise, asks to be allowed a file store, and
        # tries for minutes to reach a server that is not there.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        if url.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise _missing_extra("--mlflow", error) from error
        self._metric, self._failure = Metric, MlflowException
        try:
            self._client = MlflowClient(tracking_uri=url)
            experiment = self._client.get_experiment_by_name(_EXPERIMENT)
            number = experiment.experiment_id if experiment else self._client.create_experiment(_EXPERIMENT)
            created = self._client.create_run(number, start_time=_milliseconds(started), run_name=run)
            self._run: str = created.info.run_id
            params = [Param(key, str(value)) for key, value in config.items()]
            # MLflow takes at most 100 parameters in one call.
            for first in range(0, len(params), 100):
                self._client.log_batch(self._run, params=params[first : first + 100])
        except MlflowException as error:
            raise UserError(f"MLflow at {url} cannot be used: {error}") from error

    def figures(self, round: int, at: float, values: Mapping[str, float]) -> None:
        """Add one point to each curve.

        Raises:
            RunError: the server does not take it.
        """
        metrics = [self._metric(name, value, _milliseconds(at), round) for name, value in values.items()]
        with self._calling():
            self._client.log_batch(self._run, metrics=metrics)

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""

    def end(self, stage: Stage, at: float) -> None:
        """Close the run with its true status."""
        status = "FINISHED" if stage is Stage.FINISHED else "FAILED"
        with self._calling():
            self._client.set_terminated(self._run, status, _milliseconds(at))

    @contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except self._failure as error:
            raise RunError(f"MLflow took no more figures: {error}") from error

    def close(self) -> None:
        """Do nothing, because no connection is held open.

        A run that goes on stays open on the server.
        """


def track(run: Path, tensorboard: Path | None, mlflow: str | None, *, follow: bool = True) -> RunState:
    """Mirror a run until it has ended, or mirror what there is of it.

    Args:
        run: the run folder.
        tensorboard: folder for event files, or None.
        mlflow: tracking URL, or None.
        follow: wait for the end of a run that goes on.

    Returns:
        The state of the run when it was last read.

    Raises:
        UserError: no run, nowhere to mirror to, a store that cannot be used, or the extra is missing.
        RunError: a store failed half-way.
    """
    folder = RunFolder(run)
    if tensorboard is None and mlflow is None:
        raise UserError("say where to: --tensorboard FOLDER, --mlflow URL, or both")
    if not folder.config.is_file():
        raise UserError(f"no run folder: {run}\n`fedbags runs list FOLDER` shows the runs below a folder.")
    flat = RunConfig.from_toml(folder.config).to_flat()
    config = {key: value for key, value in flat.items() if key not in _PATHS}
    name = run.resolve().name
    mirrors: list[_Mirror] = []
    if tensorboard is not None:
        mirrors.append(_TensorBoard(tensorboard, name, config))
    if mlflow is not None:
        mirrors.append(_MLflow(mlflow, name, config, folder.config.stat().st_mtime))
    return _mirror(EventsFile(folder.metrics), mirrors, follow=follow)


def _mirror(events: EventsFile, mirrors: Sequence[_Mirror], *, follow: bool) -> RunState:
    state = RunState()
    mirrored: set[RunEvent] = set()
    with ExitStack() as at_the_end:
        for mirror in mirrors:
            at_the_end.callback(mirror.close)
        while True:
            news, restarted = events.poll()
            # The run was resumed. The events that it kept are in the mirrors already, and are skipped below.
            if restarted:
                state = RunState()
            for event in news:
                state = state.after(event)
                # The state takes every event, and the mirrors each event once.
                values = {} if event in mirrored else _figures_of(event, state)
                mirrored.add(event)
                for mirror in mirrors if values else ():
                    mirror.figures(event.round, state.last, values)
            for mirror in mirrors:
                mirror.flush()
            if state.ended:
                for mirror in mirrors:
                    mirror.end(state.stage, state.last)
            if state.ended or not follow:
                return state
            time.sleep(_INTERVAL)


def _missing_extra(option: str, error: ImportError) -> UserError:
    """Return the error to raise where the extra is not installed."""
    return UserError(
        f"{option} needs the extra that is not installed ({error.name} is missing):\n"
        "  pip install 'fedbags[tracking]'"
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
