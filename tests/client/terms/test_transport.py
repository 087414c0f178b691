"""Pseudo-labels by optimal transport: marginals and limits."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from client.terms.transport import TOLERANCE, pseudo_labels


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
