"""Proportion matching and the bounds against values computed by hand."""

import numpy as np
import pytest
import torch

from common.model.losses import level_weights

from .toy import GivenScores, Toy, batch_of, build_objective, setting_of, toy_model

LEAF = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
COARSE = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
LEAF_COUNTS = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0]])
COARSE_COUNTS = torch.tensor([[1, 1], [1, 0]])
# Bag 0 is images 0 and 1, mean (0.25, 0.25, 0.25, 0.25) at the leaf and (0.45, 0.55) above; bag 1 is image 2.
LEAF_KL = np.array([2 * 0.5 * np.log(0.5 / 0.25), np.log(1 / 0.7)])
COARSE_KL = np.array([0.5 * np.log(0.5 / 0.45) + 0.5 * np.log(0.5 / 0.55), np.log(1 / 0.9)])


MATCHING_ALONE = {"refinement": 0.0, "anneal-from": 1.0, "coarse-weight": 0.3}


def loss_by(method: str, progress: float = 1.0) -> float:
    objective = build_objective(setting_of(method, LEAF_COUNTS, progress=progress, loss=MATCHING_ALONE))
    batch = batch_of([2, 1], COARSE_COUNTS, LEAF_COUNTS)
    return objective(GivenScores(COARSE.log(), LEAF.log()), batch).item()


def test_dllp_matches_the_leaves_only() -> None:
    assert loss_by("dllp") == pytest.approx(LEAF_KL.mean(), rel=1e-6)


@pytest.mark.parametrize(("progress", "coarse"), [(0.0, 1.0), (0.25, 0.65), (1.0, 0.3)])
@pytest.mark.parametrize("method", ["dllp-hierarchical", "lhfglp"])
def test_levels_are_added_by_their_weights(method: str, progress: float, coarse: float) -> None:
    assert loss_by(method, progress) == pytest.approx((LEAF_KL + coarse * COARSE_KL).mean(), rel=1e-6)


def test_lhfglp_adds_the_price_of_its_codes() -> None:
    toy = Toy.draw(3, 4, 8, torch.Generator().manual_seed(0))
    batch, model = toy.batch(torch.arange(3)), toy_model("lhfglp")
    setting = setting_of("lhfglp", toy.leaf_counts, loss=MATCHING_ALONE)
    output, loss = model(batch.inputs), setting.config.loss
    matching = setting_of("dllp-hierarchical", toy.leaf_counts, loss=MATCHING_ALONE)
    expected = build_objective(matching)(model, batch)
    for bag in range(3):
        inside = batch.inputs.bag_index == bag
        penalties = output.penalties
        price = loss.reconstruction * penalties["reconstruction"] + loss.sparsity * penalties["codes"]
        expected = expected + price[inside].mean() / 3
    torch.testing.assert_close(build_objective(setting)(model, batch), expected)


@pytest.mark.parametrize("method", ["supervised", "supervised-hierarchical"])
def test_bounds_are_cross_entropies(method: str) -> None:
    labels = torch.tensor([0, 3, 1])
    leaf = torch.eye(4)[labels]
    setting = setting_of(method, leaf)
    loss = build_objective(setting)(
        GivenScores(COARSE.log(), LEAF.log()), batch_of([1, 1, 1], leaf.view(3, 2, 2).sum(2), leaf)
    )
    expected = -LEAF[range(3), labels].log().mean()
    if method == "supervised-hierarchical":
        weight = level_weights(setting.config.loss, 2, 1.0)[0]
        expected = expected - weight * COARSE[range(3), labels // 2].log().mean()
    torch.testing.assert_close(loss, expected)
