"""Backbones: any torchvision classifier as features, BatchNorm replaced, weights from a local file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.ops import FrozenBatchNorm2d

from common.config_tables import ModelConfig, Norm
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.backbones import Backbone, backbone_names, build_backbone
from common.model.build import build_model
from common.model.interfaces import Inputs


@pytest.mark.parametrize(
    ("name", "n_features"),
    [
        ("resnet-small", 128),
        ("resnet18", 512),
        ("resnet34", 512),
        ("resnet50", 2048),
        ("convnext_tiny", 768),
        ("swin_t", 768),
        ("vit_b_16", 768),
        ("efficientnet_b0", 1280),
    ],
)
def test_backbones_give_pooled_features_without_batch_norm(name: str, n_features: int) -> None:
    backbone = build_backbone(name, Norm.GROUP, None, image_size=32)
    assert backbone.n_features == n_features
    images = torch.randn(2, 3, 32, 32)
    features = backbone(Inputs.alone(images)).pooled
    assert features.shape == (2, n_features)
    features.sum().backward()
    modules = list(backbone.modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    assert not any(getattr(module, "inplace", False) for module in modules)
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_images_of_a_batch_do_not_mix() -> None:
    backbone = build_backbone("resnet18", Norm.GROUP, None, image_size=64)
    images = torch.randn(3, 3, 64, 64)
    alone, together = (backbone(Inputs.alone(some)).pooled for some in (images[:1], images))
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


def test_groups_are_large_divisors_and_never_single_channels() -> None:
    backbone = build_backbone("efficientnet_b0", Norm.GROUP, None, image_size=32)
    groups = {m.num_channels: m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)}
    assert groups[16] == 8
    assert groups[40] == 20
    assert groups[320] == 32
    assert all(channels // count >= 2 and channels % count == 0 for channels, count in groups.items())


def test_small_resnet_is_small() -> None:
    parameters = build_backbone("resnet-small", Norm.GROUP, None, image_size=48).parameters()
    assert 250_000 < sum(parameter.numel() for parameter in parameters) < 350_000


@pytest.mark.parametrize(
    ("name", "near"), [("resnet_18", "resnet18"), ("efficientnet-b0", "efficientnet_b0"), ("small", None)]
)
def test_unknown_names_are_refused_with_close_matches(name: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=near or "neither"):
        build_backbone(name, Norm.GROUP, None, image_size=32)


@pytest.mark.parametrize(
    ("name", "image_size", "reason"),
    [
        ("squeezenet1_1", 64, "no linear classifier"),
        ("vit_b_16", 40, "40 px"),
        ("alexnet", 16, "16 px"),
        ("googlenet", 96, "one pooled feature"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_models_that_cannot_serve_are_refused(name: str, image_size: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_backbone(name, Norm.GROUP, None, image_size)


def test_names_are_classifiers_only() -> None:
    assert {"resnet-small", "resnet50", "swin_t"} <= set(backbone_names())
    assert not any(
        name.startswith(("fasterrcnn", "deeplab", "quantized", "r3d")) for name in backbone_names()
    )


def trained_resnet18(classes: int) -> nn.Module:
    """A ResNet-18 whose BatchNorm statistics and affine weights are not the initial ones."""
    torch.manual_seed(0)
    model = resnet18(num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.fixture(params=["weights.safetensors", "weights.pth"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    state = trained_resnet18(classes=7).state_dict()
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def test_frozen_batch_norm_reproduces_the_weights_file(weights: Path) -> None:
    backbone = build_backbone("resnet18", Norm.FROZEN_BATCH, weights, image_size=32)
    reference = trained_resnet18(classes=7)
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    backbone.train()
    torch.testing.assert_close(backbone(Inputs.alone(images)).pooled, reference(images), atol=1e-5, rtol=1e-4)
    assert backbone.ignored_weights == ("fc.bias", "fc.weight")
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == 20
    assert not any(list(module.parameters()) for module in frozen)


def test_group_norm_keeps_the_affine_weights_and_drops_the_statistics(weights: Path) -> None:
    backbone = build_backbone("resnet18", Norm.GROUP, weights, image_size=32)
    reference = trained_resnet18(classes=7)
    state = backbone.body.state_dict()
    assert not any("running" in name for name in state)
    for name, value in state.items():
        assert torch.equal(value, reference.state_dict()[name])


def test_frozen_batch_norm_without_a_weights_file_is_refused(tree: Hierarchy) -> None:
    with pytest.raises(ConfigError, match=r"model\.weights"):
        build_model(ModelConfig(backbone="resnet18", norm=Norm.FROZEN_BATCH), tree, seed=0)


def test_a_classifier_of_several_layers_keeps_all_but_the_last(tmp_path: Path) -> None:
    path = tmp_path / "mobilenet.safetensors"
    save_file(mobilenet_v3_small(num_classes=5).state_dict(), path)
    backbone = build_backbone("mobilenet_v3_small", Norm.GROUP, path, image_size=32)
    assert backbone.n_features == 1024
    assert backbone.ignored_weights == ("classifier.3.bias", "classifier.3.weight")


def test_small_resnet_weights_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    first = build_backbone("resnet-small", Norm.GROUP, None, image_size=32)
    save_file(first.body.state_dict(), path)
    second = build_backbone("resnet-small", Norm.GROUP, path, image_size=32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def _break(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    match fault:
        case "missing":
            del state["conv1.weight"]
        case "unknown":
            state["conv9.weight"] = torch.zeros(1)
        case "shape":
            state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    return state


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("missing", "missing: conv1.weight"),
        ("unknown", "unknown: conv9.weight"),
        ("shape", r"shape of conv1.weight: \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"),
    ],
)
def test_weights_of_another_model_are_refused_by_key(tmp_path: Path, fault: str, text: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_break(resnet18().state_dict(), fault), path)
    with pytest.raises(UserError, match=text):
        build_backbone("resnet18", Norm.GROUP, path, image_size=32)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"not a model at all"])
def test_damaged_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        build_backbone("resnet18", Norm.GROUP, path, image_size=32)


def test_missing_and_nested_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        build_backbone("resnet18", Norm.GROUP, tmp_path / "none.pth", image_size=32)
    torch.save({"epoch": 3, "model": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="flat state dict"):
        build_backbone("resnet18", Norm.GROUP, tmp_path / "checkpoint.pth", image_size=32)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save(Backbone(nn.Identity(), 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="cannot be read"):
        build_backbone("resnet18", Norm.GROUP, tmp_path / "module.pth", image_size=32)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet-small", 32, (32, 8, 8)),
        ("resnet-small", 48, (64, 6, 6)),
        ("resnet18", 64, (128, 8, 8)),
        ("swin_t", 64, (192, 8, 8)),
        ("vit_b_32", 32, None),
        ("colour-histogram", 32, None),
    ],
)
def test_the_map_is_the_last_of_six_positions_and_the_rest_follows_from_it(
    name: str, size: int, shape: tuple[int, int, int] | None
) -> None:
    backbone = build_backbone(name, Norm.GROUP, None, image_size=size).eval()
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = backbone(Inputs.alone(images))
    assert backbone.map_shape == shape
    if shape is None:
        assert features.map is None
        with pytest.raises(ConfigError, match="no feature map"):
            backbone.tail(torch.zeros(3, 1, 6, 6))
        return
    assert features.map is not None
    assert features.map.shape == (3, *shape)
    torch.testing.assert_close(backbone.tail(features.map), features.pooled)
    assert not torch.allclose(backbone.tail(torch.zeros_like(features.map)), features.pooled)


class Shapes(nn.Module):
    """A network whose modules give tensors of these shapes, one after the other."""

    n_features = 4

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(_Shape(shape) for shape in shapes)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            layer(self.weight, len(images))
        return self.weight * torch.ones(len(images), 4)


class _Shape(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, weight: Tensor, number: int) -> Tensor:
        return weight * torch.zeros(number, *self.shape)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(4, 8, 8), (8, 8, 4), (8, 2, 2)], (4, 8, 8)),  # the second has its channels last
        ([(4, 8, 8), (5, 6, 6), (8, 2, 2)], (5, 6, 6)),
        ([(8, 2, 2), (9, 2, 2)], (9, 2, 2)),
        ([(4, 8, 8), (5, 8)], None),  # tokens: the map before them is not what was learned
        ([], None),
    ],
)
def test_the_map_prefers_resolution_then_depth(
    shapes: list[tuple[int, ...]], found: tuple[int, int, int] | None
) -> None:
    backbone = Backbone(Shapes(*shapes), 4)
    backbone.find_map(8)
    assert backbone.map_shape == found
