"""The model: its unrolled steps, its masks, its switches, and what its scores mean."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config_tables import ModelConfig
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.classifier import (
    HierarchicalClassifier,
    Levels,
    Pieces,
    consistent_prediction,
    log_probabilities,
)
from common.model.dictionary import DictionaryBlock, soft_threshold
from common.model.heads import LinearHead
from common.model.interfaces import Features, Inputs
from common.model.methods import method_names, recipe

Make = Callable[..., HierarchicalClassifier]
NOTHING = Inputs.alone(torch.zeros(0, 3, 4, 4))
"""A dictionary does not look at the images."""


class Flatten(nn.Module):
    """A backbone that can be seen through: one linear map."""

    n_features = 10

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, self.n_features)

    def forward(self, inputs: Inputs) -> Features:
        return Features(self.linear(inputs.images.flatten(1)))


def built(
    tree: Hierarchy, levels: Levels, *, dictionary: bool, shape: tuple[int, int]
) -> HierarchicalClassifier:
    """A model on the linear backbone; ``shape`` is atoms per class and iterations."""
    backbone, sizes = Flatten(), tree.sizes
    heads = [LinearHead(10, size) for size in (sizes[-1:] if levels.leaf_only else sizes)]
    blocks = [DictionaryBlock(10, size, *shape) for size in sizes] if dictionary else []
    return HierarchicalClassifier(tree, Pieces(backbone=backbone, heads=heads, blocks=blocks), levels)


@pytest.fixture
def make(tree: Hierarchy) -> Make:
    """Build a small model from seed 0 with the given switches."""

    def build(
        dictionary: bool = True, masks: bool = True, tied: bool = False, leaf_only: bool = False
    ) -> HierarchicalClassifier:
        torch.manual_seed(0)
        levels = Levels(masks=masks, tied=tied, leaf_only=leaf_only)
        return built(tree, levels, dictionary=dictionary, shape=(3, 4))

    return build


@pytest.fixture
def images() -> Inputs:
    return Inputs.alone(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3)))


def numpy_steps(
    block: DictionaryBlock, u: NDArray[np.float64], m: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """ISTA written as the textbook has it, one image at a time."""
    atoms = block.atoms.detach().double().numpy()
    d = atoms / np.linalg.norm(atoms, axis=0)
    eta = np.exp(block.log_step.detach().double().numpy())
    tau = np.exp(block.log_threshold.detach().double().numpy())
    z = np.zeros((len(u), d.shape[1]))
    steps = []
    for t in range(len(eta)):
        for i in range(len(u)):
            weighted = d @ np.diag(m[i])
            point = z[i] - eta[t] * weighted.T @ (weighted @ z[i] - u[i])
            z[i] = np.sign(point) * np.maximum(np.abs(point) - tau[t], 0)
        steps.append(z.copy())
    return steps


@pytest.mark.parametrize("masked", [False, True])
def test_unrolled_steps_agree_with_a_float64_reference(masked: bool) -> None:
    torch.manual_seed(4)
    block = DictionaryBlock(n_features=12, n_classes=5, atoms_per_class=4, iterations=6)
    u = torch.nn.functional.normalize(torch.randn(7, 12), dim=1)
    m = torch.rand(7, 20) * (torch.rand(7, 20) > 0.4)
    reference = numpy_steps(block, u.double().numpy(), m.double().numpy() if masked else np.ones((7, 20)))
    for step, expected in zip(
        block.steps(u, block.dictionary(), m if masked else None), reference, strict=True
    ):
        np.testing.assert_allclose(step.detach().numpy(), expected, atol=1e-6)
    block.double()
    for step, expected in zip(
        block.steps(u.double(), block.dictionary(), m.double() if masked else None), reference, strict=True
    ):
        np.testing.assert_allclose(step.detach().numpy(), expected, atol=1e-14)


def test_masked_atoms_are_exactly_zero_at_every_step_and_get_no_gradient() -> None:
    torch.manual_seed(5)
    block = DictionaryBlock(n_features=12, n_classes=5, atoms_per_class=4, iterations=6)
    m = torch.rand(9, 20)
    m[:, 8:16] = 0
    steps = block.steps(torch.randn(9, 12), block.dictionary(), m)
    for step in steps:
        assert torch.equal(step[:, 8:16], torch.zeros(9, 8))
        assert (step[:, :8] != 0).any()
    steps[-1].square().sum().backward()
    assert block.atoms.grad is not None
    assert torch.equal(block.atoms.grad[:, 8:16], torch.zeros(12, 8))


def test_steps_lower_the_lasso_objective_at_the_initial_step_size() -> None:
    torch.manual_seed(6)
    block = DictionaryBlock(n_features=16, n_classes=20, atoms_per_class=8, iterations=30)
    u = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    penalty = (block.log_threshold - block.log_step).exp()[0]
    values = [
        0.5 * (u - z @ block.dictionary().T).square().sum(1) + penalty * z.abs().sum(1)
        for z in block.steps(u, block.dictionary(), None)
    ]
    for before, after in pairwise(values):
        assert (after <= before + 1e-6).all()


def test_block_gradcheck() -> None:
    torch.manual_seed(7)
    block = DictionaryBlock(n_features=6, n_classes=3, atoms_per_class=2, iterations=3).double()
    feature = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parents = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def run(feature: Tensor, parents: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        made = torch.func.functional_call(block, given, (NOTHING, Features(feature), parents))
        return (made.features.pooled, *made.evidence.values(), made.penalties["reconstruction"])

    assert torch.autograd.gradcheck(run, (feature, parents, *block.parameters()))


def test_soft_threshold_has_exact_zeros() -> None:
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert soft_threshold(z, torch.tensor(0.5)).tolist() == [-1.5, 0.0, 0.0, 0.0, 1.5]


def test_atoms_have_unit_norm_whatever_their_parameters(make: Make) -> None:
    block = make().blocks[0]
    assert isinstance(block, DictionaryBlock)
    with torch.no_grad():
        block.atoms.mul_(torch.linspace(0.01, 100, block.atoms.shape[1]))
    torch.testing.assert_close(block.dictionary().norm(dim=0), torch.ones(6))


def test_refinement_is_equivariant_to_the_scale_of_the_feature(make: Make) -> None:
    """Thresholds are relative to |h|, so a backbone of any output scale is coded alike."""
    block = make().blocks[1]
    h = torch.randn(4, 10)
    made, made_1000 = block(NOTHING, Features(h), None), block(NOTHING, Features(1000 * h), None)
    torch.testing.assert_close(made_1000.features.pooled, 1000 * made.features.pooled)
    torch.testing.assert_close(made_1000.evidence, made.evidence)
    torch.testing.assert_close(made_1000.penalties, made.penalties)


def test_a_zero_feature_is_left_alone_with_finite_gradients(make: Make) -> None:
    block = make().blocks[0]
    h = torch.zeros(2, 10, requires_grad=True)
    made = block(NOTHING, Features(h), None)
    (made.features.pooled.sum() + made.evidence["codes"].sum()).backward()
    assert torch.equal(made.features.pooled, h)
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_switched_off_is_exactly_the_plain_pipeline(make: Make, images: Inputs) -> None:
    full, off = make(), make(dictionary=False, masks=False)
    shared = {name: value for name, value in full.state_dict().items() if not name.startswith("blocks.")}
    assert {name: value.tolist() for name, value in off.state_dict().items()} == {
        name: value.tolist() for name, value in shared.items()
    }
    features = off.backbone(images)
    output = off(images)
    for head, scores in zip(off.heads, output.scores, strict=True):
        assert torch.equal(scores, head(features)[0])
    assert output.evidence == {}
    assert torch.equal(output.features.pooled, features.pooled)
    assert output.penalties == {}
    sum(scores.square().sum() for scores in output.scores).backward()
    gradients = [parameter.grad for parameter in off.backbone.parameters()]
    off.zero_grad()
    features = off.backbone(images)
    sum(head(features)[0].square().sum() for head in off.heads).backward()  # type: ignore[union-attr]
    for mine, plain in zip(gradients, off.backbone.parameters(), strict=True):
        assert mine is not None
        assert plain.grad is not None
        assert torch.equal(mine, plain.grad)


def test_codes_of_zero_leave_the_pipeline_untouched(make: Make, images: Inputs) -> None:
    full, off = make(), make(dictionary=False)
    with torch.no_grad():
        for block in full.blocks:
            assert isinstance(block, DictionaryBlock)
            block.log_threshold.fill_(10.0)
    mine, plain = full(images), off(images)
    assert not any(code.any() for code in mine.evidence["codes"])
    for a, b in zip(mine.scores, plain.scores, strict=True):
        assert torch.equal(a, b)


def test_masks_follow_the_level_above(make: Make, images: Inputs, tree: Hierarchy) -> None:
    model = make()
    with torch.no_grad():
        # The top level is certain of class b: only o, below it, and only leaf 4, below o, stay switched on.
        model.heads[0].weight.zero_()
        model.heads[0].bias.copy_(torch.tensor([0.0, 9.0]))
        model.heads[1].weight.zero_()
        model.heads[1].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    codes = model(images).evidence["codes"]
    assert codes[0].any()
    assert not codes[1][:, :6].any()
    assert codes[1][:, 6:].any()
    assert not codes[2][:, :9].any()
    assert codes[2][:, 9:].any()
    unmasked = make(masks=False)(images).evidence["codes"]
    assert all((code.reshape(6, -1, 3) != 0).any(dim=(0, 2)).all() for code in unmasked)


def test_no_gradient_flows_through_a_mask(make: Make, images: Inputs) -> None:
    model = make()
    model(images).scores[-1].sum().backward()
    assert model.heads[0].weight.grad is None
    assert model.blocks[0].atoms.grad is not None


def test_masks_without_a_dictionary_have_no_effect(make: Make, images: Inputs) -> None:
    a, b = make(dictionary=False, masks=True)(images), make(dictionary=False, masks=False)(images)
    assert all(torch.equal(x, y) for x, y in zip(a.scores, b.scores, strict=True))


def test_leaf_only_sums_leaves_up_the_tree(make: Make, images: Inputs, tree: Hierarchy) -> None:
    model = make(dictionary=False, leaf_only=True)
    output = model(images)
    leaf = model.heads[0](model.backbone(images))[0].softmax(1).detach().double().numpy()
    for scores, expected in zip(output.scores, tree.roll_up(leaf), strict=True):
        np.testing.assert_allclose(scores.detach().exp().numpy(), expected, rtol=1e-5)
    for scores, log_p in zip(output.scores, log_probabilities(output), strict=True):
        torch.testing.assert_close(scores, log_p)


def test_leaf_only_is_stable_where_probabilities_underflow(make: Make, images: Inputs) -> None:
    model = make(dictionary=False, leaf_only=True)
    with torch.no_grad():
        model.heads[0].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 900.0]))
    output = model(images)
    assert all(scores.isfinite().all() for scores in output.scores)
    sum(scores.sum() for scores in output.scores).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


def test_leaf_only_with_a_dictionary_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="head at every level"):
        make(dictionary=True, leaf_only=True)
    with pytest.raises(ValueError, match="head at every level"):
        make(dictionary=False, tied=True, leaf_only=True)


@pytest.mark.parametrize("dictionary", [False, True])
def test_tied_scores_are_one_distribution_over_the_paths(
    make: Make, images: Inputs, tree: Hierarchy, dictionary: bool
) -> None:
    own = make(dictionary=dictionary, masks=False)(images).scores
    tied = make(dictionary=dictionary, masks=False, tied=True)(images).scores
    paths = torch.as_tensor(tree.paths)
    path_scores = torch.stack([own[level][:, paths[:, level]] for level in range(3)]).sum(dim=0)
    leaf = path_scores.softmax(dim=1)
    for level, size in enumerate(tree.sizes):
        for c in range(size):
            below = leaf[:, paths[:, level] == c].sum(dim=1)
            torch.testing.assert_close(tied[level][:, c].exp(), below)


def test_tied_scores_carry_what_is_learned_of_a_parent_to_its_leaves(
    make: Make, images: Inputs, tree: Hierarchy
) -> None:
    model = make(dictionary=False, masks=False, tied=True)
    before = model(images).scores[-1].exp()
    with torch.no_grad():
        model.heads[0].bias[0] += 1.0
    after = model(images).scores[-1].exp()
    inside = torch.as_tensor(tree.paths)[:, 0] == 0
    assert (after[:, inside] > before[:, inside]).all()
    assert (after[:, ~inside] < before[:, ~inside]).all()


def test_predictions_are_consistent_and_probabilities_sum_to_one(
    make: Make, images: Inputs, tree: Hierarchy
) -> None:
    output = make()(images)
    for log_p in log_probabilities(output):
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(6))
    predicted = consistent_prediction(output, tree)
    assert {tuple(path) for path in predicted.tolist()} <= {tuple(path) for path in tree.paths.tolist()}


def test_bfloat16_autocast_trains(make: Make, images: Inputs) -> None:
    model = make()
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    assert output.penalties["reconstruction"].dtype == torch.float32
    for a, b in zip(output.scores, exact.scores, strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.1, rtol=0.1)
    (sum(scores.float().sum() for scores in output.scores) + output.penalties["codes"].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("levels", [1, 2])
def test_shallow_trees_and_single_classes(levels: int, images: Inputs) -> None:
    hierarchy = Hierarchy.from_rows(["a", "b"][:levels], [["only"] * levels])
    model = built(hierarchy, Levels(masks=True, tied=True), dictionary=True, shape=(2, 1))
    assert [scores.shape for scores in model(images).scores] == [(6, 1)] * levels


def test_codes_are_sparse_but_alive_at_the_start(tree: Hierarchy) -> None:
    model = build_model(ModelConfig(masks=False), tree, seed=0)
    pixels = torch.rand(16, 3, 48, 48, generator=torch.Generator().manual_seed(8)) * 2 - 1
    for code in model(Inputs.alone(pixels)).evidence["codes"]:
        assert 0.1 <= (code != 0).float().mean() <= 0.5


@pytest.mark.parametrize("method", method_names())
def test_methods_share_their_weights_and_leave_the_generator_alone(method: str, tree: Hierarchy) -> None:
    before = torch.random.get_rng_state()
    model = build_model(ModelConfig(method=method), tree, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = build_model(ModelConfig(method=method), tree, seed=3).state_dict()
    other = build_model(ModelConfig(), tree, seed=3).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name])
        if name.startswith("backbone."):
            assert torch.equal(value, other[name])
    assert bool(model.blocks) == (method == "lhfglp")
    assert len(model.heads) == (1 if recipe(method).leaf_only else 3)


def test_a_seed_gives_the_same_model_on_any_number_of_threads(tree: Hierarchy) -> None:
    models = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            models.append(build_model(ModelConfig(), tree, seed=3).state_dict())
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    for other in models[1:]:
        for name, value in models[0].items():
            assert torch.equal(value, other[name]), name
