"""Probes: recall by hand and by chance, one of somebody else through the command, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.data.labelled import LabelledImages
from common import parts
from common.config import RunConfig
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.parts import Kind, NoSettings, Part
from deploy.compare import probes
from deploy.compare.plan import _ORDER, RESULT
from deploy.compare.probes import _recall_at_1, measure
from deploy.compare.run import compare, list_cells
from deploy.compare.scenario import Scenario
from tests.deploy.compare import toy_probe

from .conftest import LEAVES, SIZE, pixels

Write = Callable[..., Path]
TREE = Hierarchy.from_rows(["leaf"], [[name] for name in "abcd"])
CPU = torch.device("cpu")
ASKED = '"small"\nprobes = ["confidence", "recall"]'


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_registered", {})


def test_recall_of_four_images_by_hand() -> None:
    """The first two are next to each other whatever their length; the last two are of different leaves."""
    features = torch.tensor([[1.0, 0], [20, 1], [0, 1], [0.2, 1]])
    labels = np.array([0, 0, 1, 0])
    assert _recall_at_1(features, labels) == 0.5
    assert _recall_at_1(features[[3, 1, 0, 2]], labels[[3, 1, 0, 2]]) == 0.5
    assert _recall_at_1(features, np.array([0, 0, 1, 1])) == 1.0
    assert _recall_at_1(features[:1], labels[:1]) == 0.0


def test_equally_near_images_share_a_hit() -> None:
    """Of collapsed features each image has three others, one of its leaf: no order helps."""
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        assert _recall_at_1(torch.ones(4, 2), np.array(labels)) == pytest.approx(1 / 3)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features, labels = torch.from_numpy(rng.normal(size=(50, 4))), rng.integers(0, 3, 50)
    whole = _recall_at_1(features, labels)
    monkeypatch.setattr(probes, "_IMAGES_AT_ONCE", 7)
    assert _recall_at_1(features, labels) == pytest.approx(whole)
    assert 0.1 < whole < 0.6


def random_model_recall(images: np.ndarray, labels: np.ndarray) -> float:
    config = RunConfig().with_changes({"model.image-size": SIZE})
    test = LabelledImages(TREE, images, labels, len(labels))
    return measure(["recall"], build_model(config.model, TREE, seed=0), test, CPU)["recall.leaf@1"]


def test_a_random_model_is_near_chance_where_images_say_nothing_of_their_leaf() -> None:
    """Its features hold colours: where those tell the leaf, it is far above (a floor for trained ones)."""
    rng = np.random.default_rng(0)
    labels = np.arange(320) % LEAVES
    images = pixels(labels, rng)
    chance = (len(labels) / LEAVES - 1) / (len(labels) - 1)
    assert random_model_recall(images, rng.permutation(labels)) == pytest.approx(chance, abs=0.1)
    assert random_model_recall(images, labels) > 0.6


@pytest.mark.usefixtures("in_this_process", "no_pictures")
def test_a_trained_comparison_is_probed_without_training_again(scenario: Write, tmp_path: Path) -> None:
    parts.register_part(toy_probe.PART)
    out = tmp_path / "out"
    run = out / "runs" / "dllp_bag8_seed0_pooled"
    compare(scenario(), out)
    plain = {path: path.read_text() for path in (*out.glob("table.*"), run / RESULT, run / _ORDER)}
    assert not any("probe" in text for text in plain.values())
    trained = (run / "model.safetensors").stat().st_mtime_ns
    asked = scenario(title=ASKED)
    assert [cell["state"] for cell in list_cells(asked, out)] == ["stopped"]

    (row,) = compare(asked, out).table["rows"]
    assert (run / "model.safetensors").stat().st_mtime_ns == trained
    assert list(row["probes"]) == ["confidence.mean", "recall.leaf@1"]
    assert 0.25 <= row["probes"]["confidence.mean"] <= 1
    assert 0 <= row["probes"]["recall.leaf@1"] <= 1
    before = json.loads(plain[run / RESULT])
    assert json.loads((run / RESULT).read_text()) == {**before, "probes": row["probes"]}
    (line,) = csv.DictReader((out / "table.csv").read_text().splitlines())
    assert float(line["recall.leaf@1"]) == row["probes"]["recall.leaf@1"]
    header = next(line for line in (out / "table.md").read_text().splitlines() if "method" in line)
    assert "| level_2 | confidence.mean | recall.leaf@1 | L1 |" in header
    assert [cell["state"] for cell in list_cells(asked, out)] == ["done"]

    compare(scenario(), out)
    assert {path: path.read_text() for path in out.glob("table.*")} == {
        path: text for path, text in plain.items() if path.parent == out
    }, "columns that are no longer asked for are gone"


@pytest.mark.usefixtures("in_this_process", "no_pictures")
def test_a_cell_is_trained_and_probed_in_one_go_at_every_site(scenario: Write, tmp_path: Path) -> None:
    path = scenario(
        '[settings.local-only]\n[[methods]]\nname = "dllp"\nmethod = "dllp"\n',
        title='"small"\nprobes = ["recall"]',
    )
    rows = compare(path, tmp_path / "out").table["rows"]
    values = [row["probes"]["recall.leaf@1"] for row in rows]
    assert len(values) == 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"| {sum(values) / 2:.3f} |" in text


def test_an_unknown_probe_is_named_with_the_nearest(scenario: Write) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no probe 'recal'; did you mean 'recall'\?; known: recall"
    ):
        Scenario.load(scenario(title='"small"\nprobes = ["recal"]'))


@pytest.mark.parametrize("figures", [{}, {"x": float("nan")}, {"x": float("inf")}])
def test_what_is_no_figure_is_refused_by_name(figures: dict[str, float]) -> None:
    def build(settings: NoSettings) -> Any:
        return lambda model, test, device: figures

    parts.register_part(Part(Kind.PROBE, "odd", build, "a test"))
    test = LabelledImages(TREE, np.zeros((1, SIZE, SIZE, 3), np.uint8), np.zeros(1, np.int64), 1)
    with pytest.raises(UserError, match="probe 'odd' gave"):
        measure(["odd"], build_model(RunConfig().model, TREE, seed=0), test, CPU)
