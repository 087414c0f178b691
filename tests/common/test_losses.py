"""Proportion losses against values computed by hand, and where they could break."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config_tables import LossConfig
from common.model.losses import (
    bag_mean_probabilities,
    level_divergence,
    level_weights,
    proportion_kl,
    proportion_l1,
)

# Bag 0 has two images, predicted (1/2, 1/2) and (1/4, 3/4): mean (3/8, 5/8). Bag 1 has one: (0.9, 0.1).
SCORES = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]).log()
BAGS = torch.tensor([0, 0, 1])


def test_means_over_ragged_bags() -> None:
    means = bag_mean_probabilities(SCORES, BAGS, 2)
    torch.testing.assert_close(means, torch.tensor([[0.375, 0.625], [0.9, 0.1]]))


def test_kl_and_l1_by_hand() -> None:
    counts = torch.tensor([[1, 1], [1, 0]])
    kl = [0.5 * log(0.5 / 0.375) + 0.5 * log(0.5 / 0.625), log(1 / 0.9)]
    torch.testing.assert_close(proportion_kl(SCORES, BAGS, counts), torch.tensor(kl))
    torch.testing.assert_close(proportion_l1(SCORES, BAGS, counts), torch.tensor([0.25, 0.2]))


def test_a_perfect_fit_costs_nothing() -> None:
    scores = torch.tensor([[80.0, 0.0, 0.0], [0.0, 80.0, 0.0], [80.0, 0.0, 0.0]])
    counts = torch.tensor([[2, 1, 0]])
    assert proportion_kl(scores, torch.zeros(3, dtype=torch.int64), counts).item() == pytest.approx(
        0, abs=1e-6
    )


@given(st.integers(0, 2**16), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
def test_kl_is_cross_entropy_minus_entropy_in_float64(seed: int, sizes: list[int], classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bag_index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    scores = torch.randn(sum(sizes), classes, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 4, (len(sizes), classes), generator=generator)
    counts[:, 0] += 1
    for bag in range(len(sizes)):
        predicted = scores[bag_index == bag].softmax(1).mean(0)
        q = counts[bag] / counts[bag].sum().double()
        expected = sum(float(a * (a / b).log()) for a, b in zip(q, predicted, strict=True) if a > 0)
        assert proportion_kl(scores, bag_index, counts)[bag].item() == pytest.approx(expected, abs=1e-9)


def test_zero_proportions_and_certain_predictions_stay_finite() -> None:
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = proportion_kl(scores, torch.tensor([0, 1]), torch.tensor([[0, 3], [0, 3]]))
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(16.1, abs=0.1)
    assert loss[1].item() == pytest.approx(0, abs=1e-6)
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_gradcheck_over_ragged_bags() -> None:
    scores = torch.randn(
        5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    bag_index, counts = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[2, 1, 0], [0, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: proportion_kl(x, bag_index, counts), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_averaged_in_float32(dtype: torch.dtype) -> None:
    scores = torch.randn(64, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    bag_index, counts = torch.arange(4).repeat_interleave(16), torch.full((4, 7), 3)
    with torch.autocast("cpu", torch.bfloat16):
        kl = proportion_kl(scores, bag_index, counts)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, proportion_kl(scores.float(), bag_index, counts))


def test_levels_add_up_by_their_weights() -> None:
    counts = torch.tensor([[1, 1], [1, 0]])
    per_bag = level_divergence((SCORES, SCORES), BAGS, [counts, counts], (0.5, 1.0))
    torch.testing.assert_close(per_bag, 1.5 * proportion_kl(SCORES, BAGS, counts))


def test_bags_count_alike_whatever_their_size() -> None:
    """The loss is a mean over bags, not over images: splitting the batch by bag changes nothing."""
    counts = torch.tensor([[1, 1], [1, 0]])
    whole = level_divergence((SCORES,), BAGS, [counts], (1.0,)).mean()
    first = level_divergence((SCORES[:2],), torch.zeros(2, dtype=torch.int64), [counts[:1]], (1.0,))
    second = level_divergence((SCORES[2:],), torch.zeros(1, dtype=torch.int64), [counts[1:]], (1.0,))
    torch.testing.assert_close(whole, torch.cat([first, second]).mean())


def test_a_level_of_weight_zero_has_no_part() -> None:
    broken = torch.full((3, 2), torch.nan)
    counts = torch.tensor([[1, 1], [1, 0]])
    per_bag = level_divergence((broken, SCORES), BAGS, [counts, counts], (0.0, 1.0))
    assert per_bag.isfinite().all()


def test_levels_must_match() -> None:
    with pytest.raises(ValueError, match="argument"):
        level_divergence((SCORES,), BAGS, [torch.ones(2, 2)], (1.0, 1.0))


def test_level_weights_fall_from_coarse_to_fine() -> None:
    config = LossConfig(anneal_from=1.0, coarse_weight=0.2, anneal_share=0.5)
    assert level_weights(config, 3, 0.0) == (1.0, 1.0, 1.0)
    assert level_weights(config, 3, 0.25) == pytest.approx((0.6, 0.6, 1.0))
    assert level_weights(config, 3, 0.5) == pytest.approx((0.2, 0.2, 1.0))
    assert level_weights(config, 3, 1.0) == pytest.approx((0.2, 0.2, 1.0))
    assert level_weights(config, 1, 0.3) == (1.0,)
    assert level_weights(LossConfig(anneal_share=0.0, coarse_weight=0.2), 2, 0.0) == pytest.approx((0.2, 1.0))
