"""Whole runs in one process: training happens, faults are reported by site, runs can be resumed."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from safetensors.numpy import load_file

from common.config import RunConfig
from common.errors import RunError, UserError
from common.files import read_json_lines
from common.records import ModelUpdate, PrivacyStatement
from common.wire import from_records, to_records
from deploy.simulation.local_grid import LocalGrid
from server.app import app
from tests.cases import shortened

Config = Callable[..., RunConfig]


def run(config: RunConfig, grid: LocalGrid | None = None, workers: int = 0) -> dict:
    flat = config.to_flat()
    with grid or LocalGrid(config.federation.sites, flat, workers) as nodes:
        app(nodes, nodes.server_context(flat))
    return json.loads((Path(config.run_dir) / "summary.json").read_text())


def model_of(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.run_dir) / "model.safetensors")


def assert_same_model(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


class Unreliable(LocalGrid):
    """A grid that changes the replies of some sites, as a broken network or a hostile site would."""

    def __init__(self, config: RunConfig, spoil: Callable[[int, str, Message], Message | None]) -> None:
        super().__init__(config.federation.sites, config.to_flat())
        self._spoil = spoil

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for reply in super().pull_messages(message_ids):
            site = reply.metadata.src_node_id - 1000
            spoiled = self._spoil(site, reply.metadata.message_type, reply)
            if spoiled is not None:
                replies.append(spoiled)
        return replies


def test_a_run_leaves_a_complete_folder(small_config: Config) -> None:
    config = small_config()
    summary = run(config)
    folder = Path(config.run_dir)
    assert {"config.toml", "model.safetensors", "model.json", "metrics.jsonl", "log.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert summary["rounds"] == 2
    assert summary["sites"] == 3
    assert summary["engine"] == "local"
    assert [level["classes"] for level in summary["levels"]] == [3, 9, 27]
    assert all(level["images"] == 72 for level in summary["levels"])
    assert {"level", "kl", "l1"} <= summary["bags"][0].keys()
    assert set(summary["per_site"]) == {"hospital-1", "hospital-2", "hospital-3"}
    assert summary["left_out"] == []
    assert RunConfig.from_toml(folder / "config.toml") == config


def test_worker_processes_give_the_same_model_bitwise(small_config: Config, tmp_path: Path) -> None:
    inline = small_config()
    run(inline)
    pooled = inline.with_changes({"run-dir": str(tmp_path / "pooled")})
    run(pooled, workers=2)
    assert_same_model(model_of(inline), model_of(pooled))


def test_training_reads_no_instance_label(small_config: Config, sites_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(sites_dir, bare)
    for path in [*bare.glob("*/test.csv"), *bare.glob("*/test")]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with_labels = small_config()
    run(with_labels)
    without = small_config({"sites-dir": str(bare), "run-dir": str(tmp_path / "without")})
    summary = run(without)
    assert summary["levels"] == []
    assert_same_model(model_of(with_labels), model_of(without))


@pytest.mark.parametrize("strategy", shortened(["fedavg", "fedadam", "fedavgm"], ["fedadam"]))
def test_a_run_killed_after_any_round_resumes_to_the_same_model(
    small_config: Config, tmp_path: Path, strategy: str
) -> None:
    unbroken = small_config(
        {"rounds": 3, "federation.strategy": strategy, "federation.server-learning-rate": 0.1}
    )
    run(unbroken)
    for last in (1, 2):
        broken = unbroken.with_changes({"run-dir": str(tmp_path / f"broken-{last}")})

        def die(site: int, kind: str, reply: Message, last: int = last) -> Message:
            if kind == "train" and reply.metadata.group_id == str(last + 1) and site == 2:
                raise KeyboardInterrupt
            return reply

        with pytest.raises(KeyboardInterrupt):
            run(broken, Unreliable(broken, die))
        summary = run(broken.with_changes({"resume": True}))
        assert summary["rounds"] == 3
        assert_same_model(model_of(unbroken), model_of(broken))
        events = read_json_lines(Path(broken.run_dir) / "metrics.jsonl")
        assert [e["round"] for e in events if e["event"] == "round"] == [1, 2, 3]


def spoiled_update(reply: Message, change: Callable[[dict], dict]) -> Message:
    honest = from_records(reply.content, ModelUpdate)
    records = to_records(honest.model_copy(update={"arrays": change(dict(honest.arrays))}))
    reply.content["arrays"], reply.content["update"] = records["arrays"], records["update"]
    return reply


def nan(arrays: dict) -> dict:
    name = next(iter(arrays))
    return arrays | {name: np.full_like(arrays[name], np.nan)}


def reshaped(arrays: dict) -> dict:
    name = next(iter(arrays))
    return arrays | {name: np.zeros(7, np.float32)}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda reply: None, "no reply within"),
        (lambda reply: Message(Error(2, "boom"), reply_to=reply), "the app failed at the site"),
        (lambda reply: spoiled_update(reply, nan), "NaN"),
        (lambda reply: spoiled_update(reply, reshaped), "shape"),
        (lambda reply: replaced(reply, RecordDict()), "unreadable reply"),
        (
            lambda reply: replaced(
                reply,
                to_records(
                    ModelUpdate(sender="hospital-1", round=1), PrivacyStatement(site="hospital-1", round=1)
                ),
            ),
            "reply of 'hospital-1'",
        ),
    ],
)
def test_a_bad_update_is_left_out_and_reported_and_the_round_goes_on(
    small_config: Config, fault: Callable[[Message], Message | None], reason: str
) -> None:
    config = small_config({"rounds": 1, "federation.quorum": 2, "federation.deadline": 3.0})

    def spoil(site: int, kind: str, reply: Message) -> Message | None:
        return fault(reply) if kind == "train" and site == 2 else reply

    summary = run(config, Unreliable(config, spoil))
    (left_out,) = summary["left_out"]
    assert left_out["site"] == "hospital-2"
    assert left_out["phase"] == "train"
    assert reason in left_out["reason"]


def replaced(reply: Message, content: RecordDict) -> Message:
    reply.content = content
    return reply


def test_an_oversized_update_is_left_out(small_config: Config) -> None:
    config = small_config({"rounds": 1, "federation.max-update-mb": 0.001})
    with pytest.raises(RunError, match="0 good update"):
        run(config)
    events = read_json_lines(Path(config.run_dir) / "metrics.jsonl")
    reasons = [event["reason"] for event in events if event["event"] == "left-out"]
    assert len(reasons) == 3
    assert all("oversized" in reason for reason in reasons)


def test_below_the_quorum_the_run_fails_and_says_for_whom(small_config: Config) -> None:
    config = small_config({"rounds": 1, "federation.quorum": 3, "federation.deadline": 3.0})

    def spoil(site: int, kind: str, reply: Message) -> Message | None:
        return None if kind == "train" and site == 3 else reply

    with pytest.raises(RunError, match=r"2 good update\(s\), the quorum is 3"):
        run(config, Unreliable(config, spoil))
    events = read_json_lines(Path(config.run_dir) / "metrics.jsonl")
    assert [e["site"] for e in events if e["event"] == "left-out"] == ["hospital-3"]
    assert events[-1]["event"] == "failed"


def test_sites_off_the_allow_list_or_with_another_tree_are_left_out(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(sites_dir, odd)
    tree = odd / "hospital-1" / "hierarchy.csv"
    lines = tree.read_text().splitlines()
    tree.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    config = small_config(
        {"sites-dir": str(odd), "rounds": 1, "federation.allow": "hospital-1,hospital-2, hospital-3"}
    )
    summary = run(config)
    assert [(item["site"], "label tree" in item["reason"]) for item in summary["left_out"]] == [
        ("hospital-1", True)
    ]
    strict = config.with_changes({"federation.allow": "hospital-2", "run-dir": str(tmp_path / "strict")})
    summary = run(strict)
    assert summary["sites"] == 1
    assert any("allow-list" in item["reason"] for item in summary["left_out"])


def test_an_existing_run_is_not_overwritten(small_config: Config) -> None:
    config = small_config({"rounds": 1})
    run(config)
    before = (Path(config.run_dir) / "summary.json").read_bytes()
    with pytest.raises(UserError, match="exists"):
        run(config)
    assert (Path(config.run_dir) / "summary.json").read_bytes() == before
    with pytest.raises(UserError, match="these keys differ"):
        run(config.with_changes({"resume": True, "seed": 5}))


def test_the_code_of_a_run_is_what_was_loaded(small_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may move on while the run goes on: the commit is read before the first round."""
    config, rounds_before = small_config({"rounds": 1}), []

    def version() -> dict[str, str | None]:
        rounds_before.append((Path(config.run_dir) / "metrics.jsonl").exists())
        return {"version": "1", "commit": "then"}

    monkeypatch.setattr("server.app.code_version", version)
    assert run(config)["code"] == {"version": "1", "commit": "then"}
    assert rounds_before == [False]
