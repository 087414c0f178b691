"""Bag-level DP-SGD: each claim of the mechanism, and a planted bug that the check of it must catch."""

import ast
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kstest
from torch import Tensor, nn

import client.private_training as private
from client.data.bags import BagStore
from client.data.batch import Batch, make_batch
from client.private_training import BagDPOptimizer, _bag_loss, train_round_privately
from client.site import TrainingSeeds
from client.training import make_setting, train_round
from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.model.build import TrainedPart, build_model, trainable_parameters
from common.model.classifier import HierarchicalClassifier
from common.model.losses import bag_means, level_divergence
from common.model.model_file import all_arrays
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness, SecureRandomness

from .conftest import write_hand_made_site

CLIP_NORM = 0.5
SLACK = 1 + 1e-6
"""Scaling rounds each number to float32."""

Scalar = bool | int | float | str


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BagStore:
    """Bags of 4, 5 and 6 images."""
    return BagStore.open(write_hand_made_site(tmp_path_factory.mktemp("site")), 16)


def configure(**changes: Scalar) -> RunConfig:
    """All three bags are trained on; a dotted key is written with two underscores."""
    base: dict[str, Scalar] = {
        "model.image-size": 16,
        "model.atoms-per-class": 2,
        "train.held-back": 0.0,
        "rounds": 5,
    }
    return RunConfig().with_changes(
        base | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    )


def make_plan(
    *,
    sigma: float = 0.0,
    clip_norm: float = CLIP_NORM,
    expected: float = 3.0,
    steps: int = 1,
    site: str = "a",
) -> PrivacyPlan:
    settings = PlanSettings(
        delta=1e-3,
        clip_norm=clip_norm,
        number_of_bags=3,
        sample_rate=expected / 3,
        steps_per_round=steps,
        rounds=5,
        release=None,
    )
    return PrivacyPlan.build(settings, InsecureSeededRandomness(seed=7, site=site), noise_multiplier=sigma)


def make_optimiser(model: nn.Module, plan: PrivacyPlan, round: int = 1) -> BagDPOptimizer:
    return BagDPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), plan, round)


def loss_of(model: HierarchicalClassifier, batch: Batch, config: RunConfig) -> Tensor:
    output, bag_index = model(batch.inputs), batch.inputs.bag_index
    per_bag = level_divergence(output.scores, bag_index, batch.level_counts, (1.0, 1.0))
    if output.penalties:
        error, l1 = output.penalties["reconstruction"], output.penalties["codes"]
        price = config.loss.reconstruction * error + 0.1 * l1
        per_bag = per_bag + bag_means(price, bag_index, len(batch))
    return per_bag.mean()


def batches(store: BagStore) -> list[Batch]:
    return [make_batch(store, np.array([bag])) for bag in range(len(store))]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One float64 vector; zeros where there is no tensor."""
    return torch.cat(
        [
            (torch.zeros_like(other) if tensor is None else tensor).double().flatten()
            for tensor, other in zip(tensors, like, strict=True)
        ]
    )


def clipped_sum(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], clip_norm: float = CLIP_NORM
) -> Tensor:
    """What the optimiser adds up for these bags, before any noise."""
    optimiser = make_optimiser(model, make_plan(clip_norm=clip_norm))
    for loss in losses:
        optimiser.add_bag(loss())
    parameters = list(model.parameters())
    total = flat([parameter.summed_grad for parameter in parameters], parameters).clone()
    optimiser.zero_grad()
    return total


def naive_sum(
    model: HierarchicalClassifier, bags: Sequence[Batch], config: RunConfig, clip_norm: float
) -> Tensor:
    """The definition, in float64: clip each bag's gradient as one vector, add."""
    exact = copy.deepcopy(model).double()
    parameters = list(exact.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for bag in bags:
        bag = replace(bag, inputs=bag.inputs.with_images(bag.inputs.images.double()))
        gradients = torch.autograd.grad(loss_of(exact, bag, config), parameters, allow_unused=True)
        gradient = flat(gradients, parameters)
        total += gradient * min(1.0, clip_norm / float(gradient.norm()))
    return total


def no_clipping(gradients: Sequence[Tensor]) -> float:
    """A planted bug: every gradient seems to lie within the clip norm."""
    return 0.0


def per_tensor_clipping(self: BagDPOptimizer) -> None:
    """A planted bug: every parameter has the clip norm to itself."""
    for parameter in self.params:
        if parameter.grad is not None:
            factor = min(1.0, self.max_grad_norm / float(parameter.grad.norm()))
            earlier = 0.0 if parameter.summed_grad is None else parameter.summed_grad
            parameter.summed_grad = earlier + factor * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("method", ["lhfglp", "dllp-hierarchical", "dllp"])
@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
@pytest.mark.parametrize("bug", ["none", "no clipping", "per-tensor clipping"])
def test_the_sum_is_that_of_the_naive_float64_loop(
    store: BagStore, method: str, clip_norm: float, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(model__method=method)
    model = build_model(config.model, store.hierarchy, seed=1)
    bags = batches(store)
    expected = naive_sum(model, bags, config, clip_norm)
    if bug == "no clipping":
        monkeypatch.setattr(private, "_total_norm", no_clipping)
    if bug == "per-tensor clipping":
        monkeypatch.setattr(BagDPOptimizer, "clip_and_accumulate", per_tensor_clipping)
    losses = [lambda bag=bag: loss_of(model, bag, config) for bag in bags]
    error = float((clipped_sum(model, losses, clip_norm) - expected).norm() / expected.norm())
    right = bug == "none" or clip_norm == 1e6  # nothing is clipped then
    assert (error < 1e-4) is right


@pytest.mark.parametrize("bug", ["none", "no clipping", "per-tensor clipping"])
def test_one_bag_moves_the_sum_by_the_clip_norm_and_replacing_it_by_twice_that(
    store: BagStore, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    first, second, third = batches(store)
    if bug == "no clipping":
        monkeypatch.setattr(private, "_total_norm", no_clipping)
    if bug == "per-tensor clipping":
        monkeypatch.setattr(BagDPOptimizer, "clip_and_accumulate", per_tensor_clipping)
    others = [lambda: loss_of(model, first, config), lambda: loss_of(model, second, config)]
    huge = lambda: 1e6 * loss_of(model, third, config)  # noqa: E731
    opposite = lambda: -1e6 * loss_of(model, third, config)  # noqa: E731
    without, with_it = clipped_sum(model, others), clipped_sum(model, [*others, huge])
    moved = float((with_it - without).norm())
    replaced = float((with_it - clipped_sum(model, [*others, opposite])).norm())
    assert (moved <= CLIP_NORM * SLACK and replaced <= 2 * CLIP_NORM * SLACK) is (bug == "none")
    if bug == "none":
        # The bound is met: replacing a bag moves the sum further than the clip norm.
        assert replaced == pytest.approx(2 * CLIP_NORM, rel=1e-5)


def test_clipping_per_image_as_stock_hooks_do_would_break_the_bound(store: BagStore) -> None:
    config = configure(model__method="dllp-hierarchical")
    model = build_model(config.model, store.hierarchy, seed=1)
    bag = batches(store)[2]
    output = model(bag.inputs)
    loss = 1e6 * level_divergence(output.scores, bag.inputs.bag_index, bag.level_counts, (1.0, 1.0)).mean()
    backward = torch.autograd.grad(loss, output.scores, retain_graph=True)
    parameters = list(model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for image in range(len(bag.inputs)):
        part = sum(
            (scores[image] * gradient[image]).sum()
            for scores, gradient in zip(output.scores, backward, strict=True)
        )
        assert isinstance(part, Tensor)
        gradient = flat(torch.autograd.grad(part, parameters, retain_graph=True), parameters)
        total += gradient * min(1.0, CLIP_NORM / float(gradient.norm()))
    assert float(total.norm()) > 1.5 * CLIP_NORM
    ours = clipped_sum(model, [lambda: 1e6 * loss_of(model, bag, config)])
    assert float(ours.norm()) <= CLIP_NORM * SLACK


def test_the_norm_is_right_where_one_float32_sum_is_not() -> None:
    gradients = [torch.full((1000, 1000), 1e-3), torch.randn(257), torch.randn(3, 5), torch.zeros(())]
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert private._total_norm(gradients) == pytest.approx(exact, rel=1e-7)


def noise_is_right(gradient: Tensor, standard_deviation: float) -> bool:
    """Whether a vector is white Gaussian noise of a standard deviation (fixed seed: no flake)."""
    return bool(kstest((gradient / standard_deviation).numpy(), "norm").pvalue > 1e-3)


@pytest.mark.parametrize("bug", ["none", "half noise", "noise times the clip norm twice"])
def test_an_empty_step_adds_the_noise_of_any_step(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(300, 300)
    plan = make_plan(sigma=2.0, expected=2.5)
    honest = PrivacyPlan.add_noise
    wrong = {"half noise": 0.5, "noise times the clip norm twice": CLIP_NORM}.get(bug, 1.0)

    def add_noise(self: PrivacyPlan, total: Tensor, round: int) -> None:
        honest(self, total, round)
        total.mul_(wrong)  # the sum is empty: all of it is noise

    monkeypatch.setattr(PrivacyPlan, "add_noise", add_noise)
    optimiser = make_optimiser(model, plan)
    before = model.weight.detach().clone()
    optimiser.step()
    assert optimiser.steps == 1
    # SGD of rate 1 from an empty sum: what moved is the noise over the expected number of bags.
    noise = (before - model.weight.detach()).flatten() * 2.5
    assert noise_is_right(noise, 2.0 * CLIP_NORM) is (bug == "none")


def test_noise_differs_between_steps_rounds_and_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(site: str, round: int, steps: int) -> Tensor:
        model = nn.Linear(100, 100)
        optimiser = make_optimiser(model, make_plan(sigma=1.0, site=site), round)
        for _ in range(steps):
            optimiser.step()
        return model.weight.grad.detach().flatten().clone()

    def largest_correlation() -> float:
        vectors = torch.stack([step("a", 1, 1), step("a", 1, 2), step("a", 2, 1), step("b", 1, 1)])
        return float((torch.corrcoef(vectors) - torch.eye(4)).abs().max())

    assert largest_correlation() < 0.05

    def seeded(self: PrivacyPlan, total: Tensor, round: int) -> None:
        total.add_(torch.randn(total.shape, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(PrivacyPlan, "add_noise", seeded)
    assert largest_correlation() > 0.99, "planted: noise from one seed"


def test_the_experiments_seed_does_not_repeat_real_noise() -> None:
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        plan = replace(make_plan(sigma=1.0), randomness=SecureRandomness())
        model = nn.Linear(8, 8)
        make_optimiser(model, plan).step()
        grads.append(model.weight.grad)
    assert not torch.equal(*grads)


@pytest.mark.parametrize("forget_empty_steps", [False, True])
def test_every_accounted_step_is_taken_the_empty_ones_too(
    store: BagStore, forget_empty_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(model__method="dllp")
    model = build_model(config.model, store.hierarchy, seed=1)
    plan = make_plan(sigma=1.0, expected=0.3, steps=12)
    drawn: list[NDArray[np.int64]] = []
    sampler = PrivacyPlan.sampler

    def watch(self: PrivacyPlan, round: int) -> list[NDArray[np.int64]]:
        drawn.extend(sampler(self, round))
        return drawn

    monkeypatch.setattr(PrivacyPlan, "sampler", watch)
    if forget_empty_steps:
        step = BagDPOptimizer.step

        def skip_when_empty(self: BagDPOptimizer) -> None:
            if any(parameter.summed_grad is not None for parameter in self.params):
                step(self)

        monkeypatch.setattr(BagDPOptimizer, "step", skip_when_empty)
        with pytest.raises(RunError, match="accounted for"):
            train_round_privately(model, store, config, 1, plan)
        return
    result = train_round_privately(model, store, config, 1, plan)
    assert any(len(bags) == 0 for bags in drawn)
    assert any(len(bags) > 0 for bags in drawn)
    assert result.steps == plan.round_event().steps == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_says_nothing(
    store: BagStore, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    first, second, _ = batches(store)
    good = [lambda: loss_of(model, first, config)]
    spoilt = [lambda: bad * loss_of(model, second, config), *good]
    assert torch.equal(clipped_sum(model, spoilt), clipped_sum(model, good))
    optimiser = make_optimiser(model, make_plan())
    optimiser.add_bag(spoilt[0]())
    optimiser.step()
    assert (optimiser.discarded, optimiser.steps) == (1, 1)
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    monkeypatch.setattr(private.math, "isfinite", lambda number: True)
    assert not clipped_sum(model, spoilt).isfinite().all(), "planted: no check"


@pytest.mark.parametrize("divide_by_drawn", [False, True])
def test_the_sum_is_divided_by_the_expected_number_of_bags(
    store: BagStore, divide_by_drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    bag = batches(store)[0]
    total = clipped_sum(model, [lambda: loss_of(model, bag, config)])
    if divide_by_drawn:
        monkeypatch.setattr(BagDPOptimizer, "scale_grad", lambda self: None)  # one bag was drawn
    optimiser = make_optimiser(model, make_plan(expected=2.5))
    optimiser.add_bag(loss_of(model, bag, config))
    optimiser.step()
    parameters = list(model.parameters())
    gradient = flat([parameter.grad for parameter in parameters], parameters)
    assert torch.allclose(gradient, total / 2.5, atol=1e-8) is not divide_by_drawn


def test_a_sum_serves_one_step_only() -> None:
    model = nn.Linear(4, 2)
    optimiser = make_optimiser(model, make_plan())
    optimiser.add_bag(model(torch.ones(1, 4)).sum())
    optimiser.step()
    after = model.weight.detach().clone()
    optimiser.step()
    assert torch.equal(model.weight, after), "without noise the second, empty step changes nothing"


def test_without_noise_and_clipping_it_is_the_non_private_step(store: BagStore) -> None:
    changes: dict[str, Scalar] = {
        "train__optimiser": "sgd",
        "train__augmentation": "none",
        "train__bags_per_step": 3,
        "train__clip_gradient": 1e6,
        "train__momentum": 0.0,
        "train__learning_rate": 0.1,
        "federation__strategy": "fedprox",
    }
    config = configure(**changes)
    ours, twin = (build_model(config.model, store.hierarchy, seed=1) for _ in range(2))
    train_round_privately(ours, store, config, 1, make_plan(clip_norm=1e6))
    train_round(twin, store, config, 1)
    start = all_arrays(build_model(config.model, store.hierarchy, seed=1))
    moved = 0.0
    for name, values in all_arrays(ours).items():
        np.testing.assert_allclose(values, all_arrays(twin)[name], atol=1e-5, err_msg=name)
        moved = max(moved, float(np.abs(values - start[name]).max()))
    assert moved > 1e-3


def test_fedprox_pulls_towards_the_servers_model_after_the_noise() -> None:
    model = nn.Linear(2, 2)
    optimiser = make_optimiser(model, make_plan())
    private._pull_towards_server(optimiser, mu=0.25)
    with torch.no_grad():
        model.weight += 4.0
    optimiser.step()
    assert torch.allclose(model.weight.grad, torch.ones(2, 2))


@pytest.mark.parametrize("method", ["lhfglp", "dllp-hierarchical", "dllp"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("part", list(TrainedPart))
def test_every_model_trains_in_every_part_and_nothing_but_the_model_leaves(
    store: BagStore, method: str, optimiser: str, part: TrainedPart
) -> None:
    config = configure(model__method=method, train__optimiser=optimiser)
    model = build_model(config.model, store.hierarchy, seed=1)
    names = {name for name, parameter in model.named_parameters()}
    trainable_parameters(model, part)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = all_arrays(model)
    result = train_round_privately(model, store, config, 2, make_plan(sigma=1.0, expected=1.5, steps=3))
    assert math.isnan(result.loss)
    assert (result.steps, result.bags, result.images) == (3, 3, 0)
    after = all_arrays(model)
    changed = {name for name in names if not np.array_equal(before[name], after[name])}
    assert changed == trained
    assert all(np.isfinite(values).all() for values in after.values())


def test_clipping_acts_on_the_gradients_that_autocast_gives(store: BagStore) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    bag = batches(store)[2]

    def in_half_precision() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return 1e6 * loss_of(model, bag, config)

    total = clipped_sum(model, [in_half_precision])
    assert float(total.norm()) == pytest.approx(CLIP_NORM, rel=1e-6)
    exact = clipped_sum(model, [lambda: 1e6 * loss_of(model, bag, config)])
    assert float(torch.cosine_similarity(total, exact, dim=0)) > 0.8


@pytest.mark.parametrize("seed_flows_on", [False, True])
def test_a_bags_gradient_does_not_depend_on_the_bags_before_it(
    store: BagStore, seed_flows_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(model__method="dllp")
    model = build_model(config.model, store.hierarchy, seed=1).train()
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 128), nn.Dropout(0.5))
    model.backbone.set_submodule("body", body)
    model.backbone.find_map(config.model.image_size)
    if seed_flows_on:
        monkeypatch.setattr(private, "_seed_modules", lambda seed, device: None)
    setting = make_setting(store, config, 1, bags=None)

    def loss(bag: int, seed: int) -> Tensor:
        batch = make_batch(store, np.array([bag]))
        return _bag_loss(model, setting, batch, seed)

    alone = loss(2, seed=5)
    loss(0, seed=4)
    after_another = loss(2, seed=5)
    assert torch.equal(alone, after_another) is not seed_flows_on


def test_seeds_of_bags_differ() -> None:
    places = [("a", 1, 0, 0), ("b", 1, 0, 0), ("a", 2, 0, 0), ("a", 1, 1, 0), ("a", 1, 0, 1)]
    assert len({TrainingSeeds(0, site).of_bag(*place) for site, *place in places}) == len(places)


def test_held_back_bags_are_not_touched(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(train__held_back=0.34)
    training, held_back = store.split(config.train.held_back, config.seed)
    assert len(held_back) == 1
    touched: set[int] = set()

    def watch(store: BagStore, bags: NDArray[np.int64]) -> Batch:
        touched.update(bags.tolist())
        return make_batch(store, bags)

    monkeypatch.setattr(private, "make_batch", watch)
    plan = replace(make_plan(sigma=1.0, steps=4), number_of_bags=2, sample_rate=1.0)
    train_round_privately(build_model(config.model, store.hierarchy, seed=1), store, config, 1, plan)
    assert touched == set(training.tolist())


def test_a_plan_for_other_bags_is_refused(store: BagStore) -> None:
    config = configure(train__held_back=0.34)
    model = build_model(config.model, store.hierarchy, seed=1)
    with pytest.raises(RunError, match="made for 3 bags"):
        train_round_privately(model, store, config, 1, make_plan())


def test_batch_norm_is_refused(store: BagStore) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    model.backbone.set_submodule("body.norm", nn.BatchNorm2d(16))
    with pytest.raises(ConfigError, match=r"BatchNorm.*body\.norm"):
        train_round_privately(model, store, config, 1, make_plan())


def test_a_buffer_that_follows_the_data_is_found(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class RunningMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("mean").lerp_(x.detach().mean(), 0.1)
            return x

    config = configure()
    model = build_model(config.model, store.hierarchy, seed=1)
    model.backbone.body = nn.Sequential(RunningMean(), model.backbone.get_submodule("body"))
    model.backbone.find_map(config.model.image_size)
    with pytest.raises(ConfigError, match=r"the model.*'backbone\.body\.0\.mean' outside"):
        train_round_privately(model, store, config, 1, make_plan())
    # What the made-up bags do not show is found where private bags are trained on.
    monkeypatch.setattr(private, "refuse_unsound", lambda model, setting: None)
    with pytest.raises(RunError, match=r"changed 'backbone\.body\.0\.mean' of the model outside"):
        train_round_privately(model, store, config, 1, make_plan())


def test_there_is_no_private_optimiser_without_a_plan() -> None:
    optimiser = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(TypeError):
        BagDPOptimizer(optimiser)  # type: ignore[call-arg]
    root = Path(private.__file__).parents[1]
    users = set()
    for package in ("client", "common", "deploy", "server"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.startswith("opacus") and "accountants" not in name for name in names):
                    users.add(path.relative_to(root).as_posix())
    assert users == {"client/private_training.py"}
