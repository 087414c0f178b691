"""Forward correction: the matrix, the groups, and the loss by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.terms.base import SiteBags
from client.terms.llpfc import ForwardCorrection, LLPFCSettings, make_groups, transition_matrix

from .toy import GivenScores, batch_of, build_objective, setting_of


@given(st.integers(0, 2**16), st.integers(1, 8), st.integers(1, 6))
@settings(deadline=None)
def test_the_matrix_says_from_which_bag_an_image_of_a_class_comes(seed: int, bags: int, classes: int) -> None:
    """By Bayes' rule, against counting: draw a bag, then an image of it."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (bags, classes)).astype(float)
    counts[:, 0] += 1
    gamma = counts / counts.sum(axis=1, keepdims=True)
    matrix = transition_matrix(gamma)
    joint = gamma / bags
    for j in range(classes):
        if joint[:, j].sum() == 0:
            assert (matrix[:, j] == 0).all()
        else:
            np.testing.assert_allclose(matrix[:, j], joint[:, j] / joint[:, j].sum())
    np.testing.assert_allclose(matrix @ joint.sum(axis=0), np.full(bags, 1 / bags))


@given(st.integers(0, 2**16), st.integers(1, 30), st.integers(1, 8))
@settings(deadline=None)
def test_groups_hold_every_bag_once_and_are_large_enough(seed: int, bags: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    groups = make_groups(rng.dirichlet(np.ones(4), bags), size, rng)
    assert sorted(np.concatenate(groups).tolist()) == list(range(bags))
    assert min(map(len, groups)) >= min(size, bags)
    assert max(map(len, groups)) < 2 * size or len(groups) == 1


def test_a_group_of_equal_bags_is_avoided() -> None:
    """Two pure bags of each class: only groups of one of each tell the classes apart."""
    gamma = np.eye(3).repeat(2, axis=0)
    hits = 0
    for seed in range(20):
        groups = make_groups(gamma, 3, np.random.default_rng(seed))
        hits += all(np.linalg.matrix_rank(gamma[group]) == 3 for group in groups)
    assert hits >= 18, "one random partition does so in 8 of 20"


def test_the_loss_by_hand() -> None:
    counts = torch.tensor([[2, 1], [1, 0], [1, 3]])
    p = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])
    gamma = np.array([[2 / 3, 1 / 3], [1, 0], [1 / 4, 3 / 4]])
    matrix = gamma / gamma.sum(axis=0)
    likelihood = [(matrix[0] * row).sum() for row in p[:3]] + [(matrix[1] * p[3]).sum()]
    expected = (-np.log(likelihood[:3]).mean() - np.log(likelihood[3])) / 2
    objective = build_objective(setting_of("llpfc", counts, llpfc_group=3))
    batch = batch_of([3, 1], counts[:2], counts[:2])
    loss = objective(GivenScores(torch.from_numpy(np.log(p)).float()), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_bags_are_known_by_their_place_in_the_store() -> None:
    """The training bags are 2, 5 and 7 of the store; the batch holds 7 and 2."""
    counts = torch.tensor([[3, 1], [1, 1], [0, 4]])
    setting = setting_of("llpfc", counts, llpfc_group=3)
    setting = replace(setting, bags=SiteBags(torch.tensor([2, 5, 7]), counts.float()))
    scores = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    loss = build_objective(setting)(
        GivenScores(scores), batch_of([1, 1], counts[:2], counts[:2], bags=[7, 2])
    )
    gamma = np.array([[3 / 4, 1 / 4], [1 / 2, 1 / 2], [0, 1]])
    rows = (gamma / gamma.sum(axis=0))[[2, 0]]
    p = scores.softmax(1).numpy()
    assert loss.item() == pytest.approx(-np.log((rows * p).sum(axis=1)).mean(), rel=1e-5)


def test_groups_last_for_the_passes_asked_and_then_change() -> None:
    counts = torch.randint(1, 5, (24, 4), generator=torch.Generator().manual_seed(0))

    def groups(round: int, **train: int) -> list[int]:
        setting = setting_of("llpfc", counts, round=round, llpfc_regroup=3)
        changes = {f"train.{key.replace('_', '-')}": value for key, value in train.items()}
        setting = replace(setting, config=setting.config.with_changes(changes))
        return ForwardCorrection(setting, LLPFCSettings(regroup=3)).group_of.tolist()

    assert groups(1) == groups(2) == groups(3)
    assert groups(4) == groups(6)
    assert groups(3) != groups(4)
    assert groups(1) == groups(12, rounds_per_pass=4) != groups(13, rounds_per_pass=4) == groups(4)
    assert groups(3, local_epochs=2) == groups(4)
