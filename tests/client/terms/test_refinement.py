"""LHFGLP's refined labels: the loss by hand, its switch, and what it adds to matching."""

import numpy as np
import pytest
import torch

from common.model.losses import level_divergence, level_weights, refined_label_loss

from .toy import GivenScores, accuracy_after_training, batch_of, build_objective, setting_of

# Four leaves in two groups; one bag of two images that holds one a and one c.
LEAF = np.array([[0.5, 0.1, 0.3, 0.1], [0.2, 0.2, 0.4, 0.2]])
COARSE = np.array([[0.6, 0.4], [0.4, 0.6]])
COUNTS = torch.tensor([[1, 0, 1, 0]])
GROUPS = torch.tensor([[1, 1]])


def loss_at(progress: float, **loss: float) -> float:
    setting = setting_of("lhfglp", COUNTS, progress=progress, loss=loss)
    scores = GivenScores(*(torch.from_numpy(np.log(level)).float() for level in (COARSE, LEAF)))
    value: float = build_objective(setting)(scores, batch_of([2], GROUPS, COUNTS)).item()
    return value


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_by_hand(share: float, temperature: float) -> None:
    """With two images and one of each label the plan is (a, 1 - a; 1 - a, a): its odds are the odds' root."""
    odds = ((LEAF[0, 0] / LEAF[0, 2]) / (LEAF[1, 0] / LEAF[1, 2])) ** (0.5 / temperature)
    a = odds / (1 + odds)
    plan = np.array([[a, 0, 1 - a, 0], [1 - a, 0, a, 0]])
    groups = plan[:, [0, 2]]  # b and d hold nothing, so a group's label is that of its one leaf
    weight = level_weights(setting_of("lhfglp", COUNTS).config.loss, 2, 1.0)[0]
    labels = -(plan * np.log(LEAF)).sum() / 2 - weight * (groups * np.log(COARSE)).sum() / 2
    matching = -0.5 * np.log(2 * LEAF.mean(axis=0)[[0, 2]]).sum()
    matching += weight * -0.5 * np.log(2 * COARSE.mean(axis=0)).sum()
    expected = (1 - share) * matching + share * labels
    assert loss_at(1.0, refinement=share, temperature=temperature) == pytest.approx(expected, abs=0.02)


def test_it_can_be_switched_off() -> None:
    batch = batch_of([2], GROUPS, COUNTS)
    scores = GivenScores(*(torch.from_numpy(np.log(level)).float() for level in (COARSE, LEAF)))
    weights = level_weights(setting_of("lhfglp", COUNTS).config.loss, 2, 1.0)
    matching = level_divergence(
        scores(batch.inputs).scores, batch.inputs.bag_index, batch.level_counts, weights
    )
    assert loss_at(1.0, refinement=0.0) == pytest.approx(matching.mean().item())


def test_coarse_labels_are_the_leaves_summed_up_and_weights_scale_levels() -> None:
    predicted = [torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()]
    labels = torch.tensor([[0.2, 0.3, 0.1, 0.4]])
    paths = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]])
    coarse = -(0.5 * np.log(0.6) + 0.5 * np.log(0.4))
    leaf = -(0.2 * np.log(0.5) + 0.3 * np.log(0.1) + 0.1 * np.log(0.3) + 0.4 * np.log(0.1))
    bag = torch.zeros(1, dtype=torch.int64)
    for weight in (2.0, 0.0):
        loss = refined_label_loss(predicted, bag, labels, paths, (weight, 1.0))
        assert loss.tolist() == pytest.approx([weight * coarse + leaf])


def test_no_gradient_flows_through_the_labels() -> None:
    setting = setting_of("lhfglp", COUNTS, loss={"refinement": 1.0, "temperature": 1.0})
    leaf, coarse = (torch.from_numpy(np.log(level)).float() for level in (LEAF, COARSE))
    model = GivenScores(coarse, leaf)
    build_objective(setting)(model, batch_of([2], GROUPS, COUNTS)).backward()
    # Cross-entropy with constant labels: the gradient of a score is (p - Q) / images.
    odds = np.sqrt((LEAF[0, 0] / LEAF[0, 2]) / (LEAF[1, 0] / LEAF[1, 2]))
    a = odds / (1 + odds)
    expected = (LEAF - np.array([[a, 0, 1 - a, 0], [1 - a, 0, a, 0]])) / 2
    gradient = model.scores[1].grad
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), expected, atol=0.01)


def test_an_absent_leaf_is_never_a_label() -> None:
    scores = torch.tensor([[0.0, 50.0, 0.0, 0.0], [0.0, 50.0, 0.0, 0.0]])
    setting = setting_of("lhfglp", COUNTS, loss={"refinement": 1.0})
    model = GivenScores(torch.zeros(2, 2), scores)
    build_objective(setting)(model, batch_of([2], GROUPS, COUNTS)).backward()
    gradient = model.scores[1].grad
    assert gradient is not None
    assert (gradient[:, 1] > 0).all()
    assert (gradient[:, [0, 2]] < 0).all()


def test_it_solves_the_toy_problem() -> None:
    assert accuracy_after_training("lhfglp", smallest=8, largest=12, steps=150, seed=1) > 0.9
