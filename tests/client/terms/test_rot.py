"""Transported pseudo-labels as a loss, against a value computed by hand."""

import numpy as np
import pytest
import torch

from .toy import GivenScores, batch_of, build_objective, setting_of


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.7, 1.0), (0.7, 0.5)])
def test_the_loss_by_hand(weight: float, temperature: float) -> None:
    """Two images, counts (1, 1): the plan is (a, 1 - a; 1 - a, a), a's odds the root of the odds' ratio, and
    of sharpened predictions the sharpened odds."""
    p = np.array([[0.8, 0.2], [0.6, 0.4]])
    odds = np.sqrt((p[0, 0] / p[0, 1]) / (p[1, 0] / p[1, 1])) ** (1 / temperature)
    a = odds / (1 + odds)
    plan = np.array([[a, 1 - a], [1 - a, a]])
    mean = p.mean(axis=0)
    matching = (0.5 * np.log(0.5 / mean)).sum()
    expected = matching - weight * (plan * np.log(p)).sum() / 2
    counts = torch.tensor([[1, 1]])
    setting = setting_of("rot", counts, rot_weight=weight, rot_temperature=temperature)
    scores = torch.from_numpy(np.log(p)).float()
    loss = build_objective(setting)(GivenScores(scores), batch_of([2], counts, counts))
    assert loss.item() == pytest.approx(expected, abs=0.02 * weight + 1e-6)
