"""TensorBoard's and MLflow's own readers give back the figures that the events have."""

import importlib.util
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import read_json_lines
from common.run_records import BagFigures, BagsEvaluated, Enrolled, Failed, Finished, RoundDone
from deploy.runs import tracking
from deploy.runs.reading import EventsFile, Stage
from deploy.runs.tracking import _figures_of, track
from server.run_folder import RunFolder

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tensorboard", "mlflow")),
    reason="the extra `tracking` is not installed",
)


class Kept:
    """A mirror that keeps what it gets."""

    def __init__(self) -> None:
        self.points: list[tuple[int, str, float]] = []
        self.ended: list[Stage] = []
        self.closed = 0

    def figures(self, round: int, at: float, values: Mapping[str, float]) -> None:
        self.points += [(round, name, value) for name, value in values.items()]

    def flush(self) -> None:
        pass

    def end(self, stage: Stage, at: float) -> None:
        self.ended.append(stage)

    def close(self) -> None:
        self.closed += 1


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run, straight from its events."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_json_lines(run / "metrics.jsonl"):
        match event["event"]:
            case "statement":
                found.setdefault(f"site/{event['site']}/epsilon-spent", []).append(
                    (event["round"], event["epsilon"])
                )
            case "round":
                found.setdefault("updates", []).append((event["round"], event["updates"]))
            case "phase":
                name = f"bytes_received/{event['phase']}"
                found.setdefault(name, []).append((event["round"], event["bytes_received"]))
    return found


@needs_extra
def test_tensorboard_reads_back_what_the_events_say(watched_run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = track(watched_run, tmp_path, None)
    assert state.stage is Stage.FINISHED
    read = EventAccumulator(str(tmp_path / "first"))
    read.Reload()
    expected = curves(watched_run)
    assert "site/hospital-3/epsilon-spent" in expected
    for name, points in expected.items():
        got = [(point.step, point.value) for point in read.Scalars(name)]
        assert got == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    times = {event["time"] for event in read_json_lines(watched_run / "metrics.jsonl")}
    assert {point.wall_time for point in read.Scalars("updates")} <= times
    text = b"".join(path.read_bytes() for path in (tmp_path / "first").iterdir())
    assert b"dp.epsilon" in text
    assert str(watched_run.parent).encode() not in text


@needs_extra
def test_mlflow_reads_back_what_the_events_say(
    watched_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # so that what track sets is undone after the test
        monkeypatch.delenv(name)
    url = tmp_path.as_uri()
    track(watched_run, None, url)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url)
    experiment = client.get_experiment_by_name("fedbags")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["dp.epsilon"] == "4.0"
    assert not {"run-dir", "sites-dir", "model.weights"} & run.data.params.keys()
    for name, points in curves(watched_run).items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == points
    ended = max(event["time"] for event in read_json_lines(watched_run / "metrics.jsonl"))
    assert run.info.end_time == round(ended * 1000)


def test_a_running_run_is_followed_to_its_end(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_INTERVAL", 0.02)
    folder, kept = RunFolder(own_run), Kept()
    folder.forget_events_after(1)
    events = [e for e in read_json_lines(folder.metrics) if e["event"] != "finished"]
    folder.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    following = threading.Thread(
        target=tracking._mirror, args=(EventsFile(folder.metrics), [kept]), kwargs={"follow": True}
    )
    following.start()
    folder.record(RoundDone(round=2, updates=3, loss=None))
    folder.record(Failed(reason="the quorum"))
    following.join(timeout=30)
    assert not following.is_alive()
    assert [(step, value) for step, name, value in kept.points if name == "updates"] == [(1, 3.0), (2, 3.0)]
    assert (kept.ended, kept.closed) == ([Stage.FAILED], 1)


def test_a_resumed_run_is_not_mirrored_twice(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = RunFolder(own_run), Kept()
    whole = folder.metrics.read_text().splitlines()
    running = [line for line in whole if json.loads(line)["event"] != "finished"]
    folder.metrics.write_text("\n".join(running) + "\n")
    looks = 0

    def resume(seconds: float) -> None:
        nonlocal looks
        looks += 1
        folder.forget_events_after(1)
        folder.record(Enrolled(event="resumed", round=1, rounds=2, sites=["hospital-1"]))
        folder.record(RoundDone(round=2, updates=1, loss=None))
        folder.record(Finished(round=2))

    monkeypatch.setattr(tracking.time, "sleep", resume)
    state = tracking._mirror(EventsFile(folder.metrics), [kept], follow=True)
    assert looks == 1
    assert [(step, value) for step, name, value in kept.points if name == "updates"] == [
        (1, 3.0),
        (2, 2.0),
        (2, 1.0),
    ]
    assert state.updates == 1


def test_held_back_figures_have_a_curve_per_level() -> None:
    levels = [BagFigures(level="leaf", kl=0.3, l1=0.4)]
    event = BagsEvaluated(round=1, score=0.5, levels=levels)
    assert _figures_of(event, tracking.RunState()) == {
        "held-back/score": 0.5, "held-back/leaf/kl": 0.3, "held-back/leaf/l1": 0.4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "tensorboard", "mlflow"),
    [("tensorboard", Path("tb"), None), ("mlflow", None, "sqlite:///m.db")],
)
def test_without_the_extra_one_clear_error_says_what_to_install(
    missing: str,
    tensorboard: Path | None,
    mlflow: str | None,
    watched_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith((missing, "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'fedbags\[tracking\]'"):
        track(watched_run, tensorboard, mlflow)
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_mirror_to_and_no_run_are_clear_errors(watched_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say where to"):
        track(watched_run, None, None)
    with pytest.raises(UserError, match="no run folder"):
        track(tmp_path, tmp_path, None)
