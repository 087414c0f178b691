"""Pseudo-labels by optimal transport: marginals, limits, and the loss by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from client.objectives import build_objective
from client.objectives.rot import TOLERANCE, pseudo_labels
from common.config import Method

from .toy import GivenScores, batch_of, setting_of


def sinkhorn(kernel: np.ndarray, counts: np.ndarray, steps: int = 500) -> np.ndarray:
    """The textbook's alternation, one bag at a time, in float64."""
    plan = kernel.copy()
    for _ in range(steps):
        sums = plan.sum(axis=0)
        plan = plan * np.divide(counts, sums, out=np.zeros_like(sums), where=counts > 0)
        plan = plan / plan.sum(axis=1, keepdims=True)
    return plan


@given(
    st.integers(0, 2**16), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([0.5, 1, 3])
)
@settings(max_examples=30, deadline=None)
def test_rows_are_labels_and_columns_the_bags_counts(seed: int, sizes: list[int], temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    bag_index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    predicted = torch.randn(sum(sizes), 4, generator=generator).log_softmax(1)
    labels = torch.randint(0, 4, (sum(sizes),), generator=generator)
    counts = torch.zeros(len(sizes), 4).index_put(
        (bag_index, labels), torch.ones(len(labels)), accumulate=True
    )
    plan = pseudo_labels(predicted, bag_index, counts, temperature)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(len(plan)))
    sums = torch.zeros_like(counts).index_add(0, bag_index, plan)
    torch.testing.assert_close(sums, counts, atol=TOLERANCE + 1e-5, rtol=0)
    assert (plan[counts[bag_index] == 0] == 0).all()
    for bag in range(len(sizes)):
        inside = (bag_index == bag).numpy()
        kernel = np.exp(predicted.double().numpy()[inside] / temperature)
        exact = sinkhorn(kernel, counts[bag].double().numpy())
        np.testing.assert_allclose(plan.numpy()[inside], exact, atol=2 * TOLERANCE)


def test_low_temperature_is_the_best_assignment_of_the_counts() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted = (3 * torch.randn(6, 3, generator=generator)).log_softmax(1)
    counts = torch.tensor([[3, 2, 1]])
    places = [0, 0, 0, 1, 1, 2]
    _, chosen = linear_sum_assignment(-predicted.numpy()[:, places])
    plan = pseudo_labels(predicted, torch.zeros(6, dtype=torch.int64), counts, 0.05)
    assert plan.argmax(dim=1).tolist() == [places[place] for place in chosen]
    assert plan.max(dim=1).values.min() > 0.9


def test_sure_predictions_against_the_counts_stay_finite() -> None:
    predicted = torch.tensor([[200.0, 0.0], [200.0, 0.0]]).log_softmax(1)
    plan = pseudo_labels(predicted, torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 2]]), 0.05)
    torch.testing.assert_close(plan, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_by_hand(weight: float) -> None:
    """Two images, counts (1, 1): the plan is (a, 1 - a; 1 - a, a), a's odds the root of the odds' ratio."""
    p = np.array([[0.8, 0.2], [0.6, 0.4]])
    odds = np.sqrt((p[0, 0] / p[0, 1]) / (p[1, 0] / p[1, 1]))
    a = odds / (1 + odds)
    plan = np.array([[a, 1 - a], [1 - a, a]])
    mean = p.mean(axis=0)
    matching = (0.5 * np.log(0.5 / mean)).sum()
    expected = matching - weight * (plan * np.log(p)).sum() / 2
    counts = torch.tensor([[1, 1]])
    setting = setting_of(Method.ROT, counts, rot_weight=weight)
    scores = torch.from_numpy(np.log(p)).float()
    loss = build_objective(setting)(GivenScores(scores), batch_of([2], counts, counts))
    assert loss.item() == pytest.approx(expected, abs=0.02 * weight + 1e-6)
