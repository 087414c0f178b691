"""Explainers: Grad-CAM by hand, one of somebody else through the command, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typer.testing import CliRunner

import fedbags
from common import parts
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, Levels, Pieces
from common.model.heads import LINEAR
from common.model.interfaces import Features, Inputs, Level
from common.parts import Kind, NoSettings, Part
from deploy.cli.main import app
from deploy.explain import GRAD_CAM, Explanation, NoExplanation, explain
from deploy.figures import draw
from deploy.figures.draw import draw_figures
from deploy.figures.samples import NoTestImages
from tests.deploy import toy_explainer
from tests.deploy.test_figures import make_run, make_sites

TREE = Hierarchy.from_rows(["leaf"], [["x"], ["y"]])


class Scaled(nn.Module):
    """A backbone whose map is the image itself, or that has no map."""

    n_features = 3

    def __init__(self, with_map: bool) -> None:
        super().__init__()
        self.scale, self.with_map = nn.Parameter(torch.ones(())), with_map
        self.map_shape = (3, 6, 6) if with_map else None

    def forward(self, inputs: Inputs) -> Features:
        map = inputs.images * self.scale
        return Features(map.mean(dim=(2, 3)), map if self.with_map else None)


def scaled_model(with_map: bool = True) -> HierarchicalClassifier:
    backbone = Scaled(with_map)
    head: Any = LINEAR.build(Level(3, backbone.map_shape, TREE, 0, fedbags.RunConfig().model), NoSettings())
    return HierarchicalClassifier(TREE, Pieces(backbone=backbone, heads=[head]), Levels()).eval()


@pytest.fixture
def inputs() -> Inputs:
    return Inputs.alone(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_registered", {})


def test_grad_cam_of_a_linear_model_is_its_weights_times_the_map(inputs: Inputs) -> None:
    """The score is w.mean(map), so the gradient is w / 36 everywhere: what is left is relu(w.map)."""
    torch.manual_seed(0)
    model, target = scaled_model(), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        found = explain(GRAD_CAM, model, inputs, target)
        weights = next(model.heads[0].parameters())[target]
    expected = torch.relu((weights[:, :, None, None] * inputs.images).sum(dim=1))
    torch.testing.assert_close(found.maps, expected / expected.amax(dim=(1, 2), keepdim=True))
    assert found.reasons is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_cam_needs_a_map(inputs: Inputs) -> None:
    with pytest.raises(NoExplanation, match="has no feature map"):
        explain(GRAD_CAM, scaled_model(with_map=False), inputs, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (Explanation(torch.zeros(4, 3, 3)), r"are not of shape \(4, 6, 6\)"),
        (Explanation(torch.full((4, 6, 6), 1.01)), r"in \[0, 1\]"),
        (Explanation(torch.full((4, 6, 6), torch.nan)), r"in \[0, 1\]"),
        (Explanation(torch.zeros(4, 6, 6), ((), ())), "reasons for 2 of 4 images"),
    ],
)
def test_what_is_no_explanation_is_refused_by_name(inputs: Inputs, given: Explanation, fault: str) -> None:
    def build(settings: NoSettings) -> Any:
        def explainer(model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Explanation:
            return given

        return explainer

    parts.register_part(Part(Kind.EXPLAINER, "odd", build, "a test"))
    with pytest.raises(UserError, match=f"explainer 'odd' gave .*{fault}"):
        explain("odd", scaled_model(), inputs, torch.zeros(4, dtype=torch.int64))


def test_an_explainer_of_ones_own_draws_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line; the pictures that it has no part in stay as they are."""

    def left_out(*_: object) -> Figure:
        raise NoTestImages("not drawn here")

    monkeypatch.setattr(draw, "_embedding", left_out)
    monkeypatch.setattr(draw, "_confusion", left_out)
    parts.register_part(toy_explainer.PART)
    run = make_run(tmp_path / "run", make_sites(tmp_path / "sites"))
    usual = draw_figures([run], tmp_path / "usual")
    command = ["figures", str(run), "--out", str(tmp_path / "centre"), "--explainer", "centre", "--json"]
    paths = [Path(path) for path in json.loads(CliRunner().invoke(app, command).stdout)]
    assert [path.name for path in paths] == [path.name for path in usual]
    changed = [
        path.name for path, other in zip(paths, usual, strict=True) if path.read_bytes() != other.read_bytes()
    ]
    assert changed == ["activation.png"]
    again = fedbags.load_run(run).figures(tmp_path / "again", explainer="centre")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_an_unknown_explainer_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        draw_figures([make_run(tmp_path / "run", tmp_path)], None, "grad-cm")
    assert str(error.value).startswith(
        "there is no explainer 'grad-cm'; did you mean 'grad-cam'?\nKnown: grad-cam."
    )
    assert not (tmp_path / "run" / "figures").exists()
