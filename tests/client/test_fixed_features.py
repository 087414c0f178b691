"""Training on fixed features: the cache, the centre, and the gradients of many bags clipped at once."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import client.data.features
import client.ghost_clipping
from client.data.bags import BagStore
from client.data.batch import make_batch
from client.data.labelled import LabelledImages
from client.evaluation import read_predictions
from client.ghost_clipping import clipped_sum, pieces, suits
from client.private_training import BagDPOptimizer, train_round_privately
from client.terms.base import Objective
from client.training import make_setting, train_round
from common.config import RunConfig
from common.config_tables import rate_by_noise
from common.model.build import build_model, trainable_parameters
from common.model.classifier import HierarchicalClassifier
from common.model.features.bank import FeatureBank, feature_bank
from common.model.features.frozen import FrozenFeatures
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness

from .conftest import write_hand_made_site

NAMES = ("colour-histogram",)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BagStore:
    """Bags of 4, 5 and 6 images, with their features."""
    return BagStore.open(write_hand_made_site(tmp_path_factory.mktemp("site")), 16, features=NAMES)


def configure(**changes: bool | float | str) -> RunConfig:
    base = {
        "model.image-size": 16, "model.features": NAMES[0], "model.dictionary": False, "rounds": 5,
        "train.held-back": 0.0, "train.optimiser": "sgd", "train.momentum": 0.0, "train.weight-decay": 0.0,
    }  # fmt: skip
    return RunConfig().with_changes(
        base | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    )


def make_plan(sigma: float = 0.0, steps: int = 4, rounds: int = 5, rate: float = 1.0) -> PrivacyPlan:
    settings = PlanSettings(
        delta=1e-3, clip_norm=0.5, number_of_bags=3, sample_rate=rate, steps_per_round=steps, rounds=rounds,
        release=None,
    )  # fmt: skip
    return PrivacyPlan.build(settings, InsecureSeededRandomness(seed=7, site="a"), noise_multiplier=sigma)


def build(config: RunConfig, store: BagStore) -> HierarchicalClassifier:
    model = build_model(config.model, store.hierarchy, 0, config.parts).train()
    trainable_parameters(model, config.trained_part)
    return model


def centre_of(model: HierarchicalClassifier) -> Tensor:
    assert isinstance(model.backbone, FrozenFeatures)
    return model.backbone.centre.detach().clone()


def exact_centre(store: BagStore) -> Tensor:
    means = [
        torch.from_numpy(np.array(store[bag].features)).double().mean(dim=0) for bag in range(len(store))
    ]
    return torch.stack(means).mean(dim=0).float()


def test_features_are_computed_once_and_anew_when_anything_changes(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    whole = FeatureBank.__call__

    def counted(self: FeatureBank, images: Tensor) -> Tensor:
        computed.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(FeatureBank, "__call__", counted)
    shown: list[tuple[int, int]] = []
    first = BagStore.open(site, 16, features=NAMES, progress=lambda done, of: shown.append((done, of)))
    assert sum(computed) == 15
    assert shown[-1] == (15, 15)
    again = BagStore.open(site, 16, features=NAMES)
    assert sum(computed) == 15
    for bag in range(3):
        images, features = first[bag].images, again[bag].features
        assert features is not None
        assert not features.flags.writeable
        wanted = whole(
            feature_bank(NAMES, 16), make_batch(BagStore.open(site, 16), np.array([bag])).inputs.images
        )
        torch.testing.assert_close(torch.from_numpy(np.array(features)), wanted)
        assert len(images) == len(features)
    BagStore.open(site, 16, features=("gabor",))
    BagStore.open(site, 8, features=NAMES)
    assert sum(computed) == 45
    (site / "bags.csv").write_text((site / "bags.csv").read_text() + "\n")
    BagStore.open(site, 16, features=NAMES)
    assert sum(computed) == 60
    # The old ones are gone, and what is in use stays.
    kept = sorted(path.name.split(".")[0] for path in (site / ".cache").glob("bags_features-*"))
    assert len(kept) == 1


def test_a_bad_image_leaves_features_and_images_in_step(site: Path) -> None:
    (site / "test" / "green.png").write_bytes(b"no image")
    (site / "images" / "12.png").write_bytes(b"no image")
    test = LabelledImages.open(site, 16, features=NAMES, skip_bad=True)
    store = BagStore.open(site, 16, features=NAMES, skip_bad=True)
    assert test is not None
    assert test.features is not None
    bank = feature_bank(NAMES, 16)
    plain = LabelledImages.open(site, 16, skip_bad=True)
    assert plain is not None
    torch.testing.assert_close(test.inputs(slice(0, 2)).features, bank(plain.inputs(slice(0, 2)).images))
    assert store.bag_ids == ("b2", "b3")
    given, images = (
        make_batch(BagStore.open(site, 16, features=f, skip_bad=True), np.array([1])) for f in (NAMES, ())
    )
    torch.testing.assert_close(given.inputs.features, bank(images.inputs.images))


def test_predictions_from_cached_features_are_those_of_the_images(site: Path) -> None:
    config = configure()
    store = BagStore.open(site, 16, features=NAMES)
    model = build(config, store)
    readings = []
    for features in (NAMES, ()):
        test = LabelledImages.open(site, 16, features=features)
        assert test is not None
        readings.append(read_predictions(model, test, CPU))
    for one, other in zip(readings[0].values(), readings[1].values(), strict=True):
        assert torch.equal(one, other)


def test_the_first_round_learns_the_centre_and_nothing_else(store: BagStore) -> None:
    config = configure()
    model = build(config, store)
    before = [parameter.detach().clone() for parameter in model.heads.parameters()]
    train_round(model, store, config, 1)
    torch.testing.assert_close(centre_of(model), exact_centre(store))
    assert all(torch.equal(a, b) for a, b in zip(before, model.heads.parameters(), strict=True))
    train_round(model, store, config, 2)
    torch.testing.assert_close(centre_of(model), exact_centre(store))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.heads.parameters(), strict=True))


@pytest.mark.parametrize("rounds", [1, 2])
def test_private_centring_averages_its_steps(store: BagStore, rounds: int) -> None:
    config = configure(dp__epsilon=1.0, train__centring_rounds=rounds)
    model = build(config, store)
    plan = make_plan()
    for round in range(1, rounds + 1):
        train_round_privately(model, store, config, round, plan)
    torch.testing.assert_close(centre_of(model), exact_centre(store), atol=1e-5, rtol=1e-4)
    before = centre_of(model)
    train_round_privately(model, store, config, rounds + 1, plan)
    assert torch.equal(before, centre_of(model))


def test_a_bag_far_from_all_public_images_moves_the_centre_no_further_than_any(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole influence of a bag on the centre is the clip norm, as in every step."""
    store = BagStore.open(site, 16, features=NAMES)
    config = configure(dp__epsilon=1.0)
    huge = np.full_like(np.array(store[0].features), 1e6)
    whole = BagStore.__getitem__
    plain, moved = build(config, store), build(config, store)
    train_round_privately(plain, store, config, 1, make_plan(steps=1))

    def far(self: BagStore, index: int) -> object:
        bag = whole(self, index)
        return bag if index else type(bag)(bag.bag_id, bag.images, bag.counts, huge)

    monkeypatch.setattr(BagStore, "__getitem__", far)
    train_round_privately(moved, store, config, 1, make_plan(steps=1))
    backbone = plain.backbone
    assert isinstance(backbone, FrozenFeatures)
    # Of the sum of three bags, each within C, divided by three and scaled as the centre is.
    most = 2 * backbone.longest / 3
    assert (centre_of(moved) - centre_of(plain)).norm() <= most * (1 + 1e-6)


def one_by_one(
    model: HierarchicalClassifier, store: BagStore, config: RunConfig, clip_norm: float
) -> dict[Tensor, Tensor]:
    """The definition, in float64: one backward pass a bag, clipped as one vector, added up."""
    objective = Objective(make_setting(store, config, 2, bags=None))
    total: dict[Tensor, Tensor] = {}
    heads = list(model.heads.parameters())
    for bag in range(len(store)):
        loss = objective(model, make_batch(store, np.array([bag])), torch.Generator())
        gradients = [gradient.double() for gradient in torch.autograd.grad(loss, heads)]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for parameter, gradient in zip(heads, gradients, strict=True):
            total[parameter] = total.get(parameter, 0) + gradient * min(1.0, clip_norm / norm)
    return total


@pytest.mark.parametrize("clip_norm", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("method", ["lhfglp", "dllp", "dllp-hierarchical"])
@pytest.mark.parametrize("pieces_of", [4096, 5])
def test_ghost_clipping_is_clipping_one_by_one(
    store: BagStore, clip_norm: float, method: str, pieces_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.ghost_clipping, "_IMAGES_AT_ONCE", pieces_of)
    config = configure(model__method=method)
    model = build(config, store)
    objective = Objective(make_setting(store, config, 2, bags=None))
    assert suits(model, objective.terms)
    made = clipped_sum(model, objective, pieces(store, np.arange(3)), clip_norm)
    wanted = one_by_one(model, store, config, clip_norm)
    assert made.discarded == 0
    assert made.gradients.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(made.gradients[parameter], gradient, rtol=1e-4, atol=1e-7 * clip_norm)
    # A bag alone never exceeds its bound.
    for bag in range(3):
        alone = clipped_sum(model, objective, pieces(store, np.array([bag])), clip_norm).gradients.values()
        assert math.sqrt(sum(float(g.square().sum()) for g in alone)) <= clip_norm * (1 + 1e-9)


def test_no_bag_and_a_bag_that_is_not_finite_add_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BagStore.open(site, 16, features=NAMES)
    config = configure()
    model = build(config, store)
    objective = Objective(make_setting(store, config, 2, bags=None))
    nothing = clipped_sum(model, objective, pieces(store, np.zeros(0, np.int64)), 1.0)
    assert all(not gradient.any() for gradient in nothing.gradients.values())
    without = clipped_sum(model, objective, pieces(store, np.array([1, 2])), 1.0)
    whole = BagStore.__getitem__

    def spoilt(self: BagStore, index: int) -> object:
        bag = whole(self, index)
        if index:
            return bag
        return type(bag)(bag.bag_id, bag.images, bag.counts, np.full_like(np.array(bag.features), np.nan))

    monkeypatch.setattr(BagStore, "__getitem__", spoilt)
    found = clipped_sum(model, objective, pieces(store, np.arange(3)), 1.0)
    assert found.discarded == 1
    for parameter, gradient in without.gradients.items():
        torch.testing.assert_close(found.gradients[parameter], gradient)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__features": "", "model__backbone": "colour-histogram"},
        {"model__dictionary": True},
        {"model__terms": "matching,vat"},
    ],
)
def test_what_is_more_than_linear_heads_is_clipped_one_by_one(
    store: BagStore, changes: dict[str, str]
) -> None:
    config = configure(**changes)
    assert not suits(build(config, store), config.model.recipe.terms)


def test_a_private_round_is_the_same_whichever_way_it_is_clipped(
    store: BagStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(dp__epsilon=1.0, train__learning_rate=0.0)
    models = []
    for ghost in (True, False):
        monkeypatch.setattr("client.private_training.suits", lambda *_, ghost=ghost: ghost)
        model = build(config, store)
        train_round_privately(model, store, config, 2, make_plan(sigma=1.0, rate=0.7))
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(models[0], models[1], rtol=1e-5, atol=1e-6)


def test_the_rate_falls_with_the_noise_and_stays_within_bounds() -> None:
    assert rate_by_noise(2.0) == pytest.approx(1.5)
    assert rate_by_noise(4.0) == pytest.approx(rate_by_noise(2.0) / 2)
    assert rate_by_noise(0.0) == 5.0
    assert rate_by_noise(1e6) == 0.25


def test_the_optimiser_of_heads_never_holds_the_centre(
    store: BagStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise on the centre in every round would drown it."""
    held: list[set[int]] = []
    whole = BagDPOptimizer.step

    def seen(self: BagDPOptimizer, *args: object) -> object:
        held.append({id(parameter) for parameter in self.params})
        return whole(self, *args)

    monkeypatch.setattr(BagDPOptimizer, "step", seen)
    config = configure(dp__epsilon=1.0)
    model = build(config, store)
    assert isinstance(model.backbone, FrozenFeatures)
    for round in (1, 2):
        train_round_privately(model, store, config, round, make_plan(steps=1))
    assert held[0] == {id(model.backbone.centre)}
    assert held[1] == {id(parameter) for parameter in model.heads.parameters()}
