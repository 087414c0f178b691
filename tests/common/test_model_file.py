"""Models on disk and as arrays: what comes back is what went in, or a clear error."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from common.config_tables import ModelConfig, Norm
from common.errors import UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.model.methods import method_names
from common.model.model_file import (
    ModelCard,
    all_arrays,
    load_arrays,
    load_model,
    save_model,
    trainable_arrays,
)

CONFIG = ModelConfig(image_size=32, atoms_per_class=2)


@pytest.fixture
def model(tree: Hierarchy) -> HierarchicalClassifier:
    return build_model(CONFIG, tree, seed=1)


@pytest.fixture
def folder(tmp_path: Path, model: HierarchicalClassifier, tree: Hierarchy) -> Path:
    save_model(tmp_path / "run", model, ModelCard.describe(CONFIG, tree, round=4))
    return tmp_path / "run"


def test_a_saved_model_predicts_alike(folder: Path, model: HierarchicalClassifier, tree: Hierarchy) -> None:
    loaded, card = load_model(folder)
    images = Inputs.alone(torch.randn(2, 3, 32, 32))
    for a, b in zip(loaded(images).scores, model.eval()(images).scores, strict=True):
        assert torch.equal(a, b)
    assert Hierarchy.from_dict(card.hierarchy) == tree
    assert (card.round, card.model, card.preprocessing.image_size) == (4, CONFIG, 32)
    assert set(card.versions) == {"fedbags", "torch", "torchvision"}
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("method", method_names())
def test_every_method_round_trips(tmp_path: Path, tree: Hierarchy, method: str) -> None:
    config = CONFIG.model_copy(update={"method": method})
    model = build_model(config, tree, seed=2)
    save_model(tmp_path, model, ModelCard.describe(config, tree, round=0))
    loaded, _ = load_model(tmp_path)
    assert {n: v.tolist() for n, v in loaded.state_dict().items()} == {
        n: v.tolist() for n, v in model.state_dict().items()
    }


def test_frozen_statistics_travel_with_the_model(tmp_path: Path, tree: Hierarchy) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(resnet18().state_dict() | {"bn1.running_mean": torch.full((64,), 0.5)}, weights)
    config = ModelConfig(backbone="resnet18", norm=Norm.FROZEN_BATCH, image_size=32, weights=str(weights))
    model = build_model(config, tree, seed=0)
    save_model(tmp_path, model, ModelCard.describe(config, tree, round=0))
    weights.unlink()
    loaded, card = load_model(tmp_path)
    assert card.model.weights == ""
    assert torch.equal(loaded.backbone.body.bn1.running_mean, torch.full((64,), 0.5))  # type: ignore[union-attr]
    frozen = set(all_arrays(model)) - set(trainable_arrays(model))
    assert "backbone.body.bn1.running_mean" in frozen


def test_a_refused_write_leaves_the_old_pair(
    folder: Path, model: HierarchicalClassifier, tree: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_model(folder, model, ModelCard.describe(CONFIG, tree, round=5))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(
    tmp_path: Path, model: HierarchicalClassifier, tree: Hierarchy
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_model(tmp_path / "file", model, ModelCard.describe(CONFIG, tree, round=0))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(folder)


def test_damaged_or_exchanged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged, or belongs to another"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("round", "x"), ("extra", 1), ("hierarchy", {}), ("hierarchy", {"levels": ["a"], "rows": [[]]})],
)
def test_cards_that_make_no_sense_are_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(folder)


def test_a_card_of_another_architecture_is_refused(folder: Path) -> None:
    path = folder / "model.json"
    card = json.loads(path.read_text())
    card["model"]["atoms-per-class"] = 3
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"blocks\.\d\.atoms"):
        load_model(folder)


def test_arrays_round_trip_without_sharing_memory(model: HierarchicalClassifier, tree: Hierarchy) -> None:
    arrays = trainable_arrays(model)
    assert all(array.dtype == np.float32 for array in arrays.values())
    other = build_model(CONFIG, tree, seed=9)
    load_arrays(other, arrays)
    assert all(np.array_equal(value, arrays[name]) for name, value in trainable_arrays(other).items())
    arrays["heads.0.bias"][:] = 7
    assert not (trainable_arrays(other)["heads.0.bias"] == 7).any()
    assert not (trainable_arrays(model)["heads.0.bias"] == 7).any()


def test_integer_buffers_stay_at_home(tree: Hierarchy) -> None:
    model = build_model(ModelConfig(backbone="swin_t", image_size=32), tree, seed=0)
    arrays = all_arrays(model)
    assert not any("relative_position_index" in name or "parents" in name for name in arrays)
    load_arrays(model, arrays)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"heads.0.bias": None}, r"missing \['heads.0.bias'\]"),
        ({"heads.9.bias": np.zeros(2, np.float32)}, r"unknown \['heads.9.bias'\]"),
        ({"heads.0.bias": np.zeros(3, np.float32)}, r"'heads.0.bias' has shape \(3,\), not \(2,\)"),
        ({"heads.0.bias": np.zeros(2)}, "'heads.0.bias' has dtype float64"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(
    model: HierarchicalClassifier, change: dict[str, np.ndarray | None], text: str
) -> None:
    before = trainable_arrays(model)
    wrong = {name: array + 1 for name, array in before.items()} | change
    with pytest.raises(ValueError, match=text):
        load_arrays(model, {name: array for name, array in wrong.items() if array is not None})
    assert all(np.array_equal(value, before[name]) for name, value in trainable_arrays(model).items())
