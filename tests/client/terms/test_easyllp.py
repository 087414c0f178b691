"""The debiased loss: unbiased by enumeration, and by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.terms.easyllp import debiased_labels, squared_errors

from .toy import GivenScores, batch_of, build_objective, setting_of


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_it_is_unbiased_by_enumeration(seed: int, size: int, classes: int) -> None:
    """Over every bag of independent labels: E[weights | label of image 0 is c] is the label c itself."""
    priors = np.random.default_rng(seed).dirichlet(np.ones(classes))
    expected = np.zeros((classes, classes))
    for labels in product(range(classes), repeat=size):
        counts = np.bincount(labels, minlength=classes)[None]
        weights = debiased_labels(torch.from_numpy(counts).double(), torch.from_numpy(priors)).numpy()[0]
        chance = np.prod([priors[label] for label in labels[1:]])
        expected[labels[0]] += chance * weights
    np.testing.assert_allclose(expected, np.eye(classes), atol=1e-9)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=6))
@settings(deadline=None)
def test_weights_sum_to_one(counts: list[int]) -> None:
    counts[0] += 1
    weights = debiased_labels(
        torch.tensor([counts]).double(), torch.full((len(counts),), 1 / len(counts)).double()
    )
    assert float(weights.sum()) == pytest.approx(1)


def test_a_bag_of_one_is_its_label() -> None:
    label = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(debiased_labels(label, torch.tensor([0.2, 0.3, 0.5])), label)


def test_squared_errors_by_hand() -> None:
    errors = squared_errors(torch.tensor([[0.7, 0.2, 0.1]]))
    expected = [0.3**2 + 0.2**2 + 0.1**2, 0.7**2 + 0.8**2 + 0.1**2, 0.7**2 + 0.2**2 + 0.9**2]
    torch.testing.assert_close(errors, torch.tensor([expected]))


def test_the_loss_by_hand() -> None:
    site = torch.tensor([[2, 1], [1, 0], [0, 4]])
    p = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])
    priors = np.array([3 / 8, 5 / 8])
    weights = [np.array([2, 1]) - 2 * priors, np.array([1, 0])]
    errors = np.stack([((row - np.eye(2)) ** 2).sum(axis=1) for row in p])
    expected = ((errors[:3] @ weights[0]).mean() + errors[3] @ weights[1]) / 2
    objective = build_objective(setting_of("easyllp", site))
    batch = batch_of([3, 1], site[:2], site[:2])
    loss = objective(GivenScores(torch.from_numpy(np.log(p)).float()), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
