"""Mixed bags: their images, their expected proportions, their interval, and the loss by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from client.terms.mixbag import interval_divergence, mix, quantile

from .toy import GivenScores, batch_of, build_objective, setting_of


def random_batch(seed: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of the images, and counts of the bags."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    bag_index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    counts = torch.zeros(len(sizes), 3).index_put(
        (bag_index, labels), torch.ones(len(labels)), accumulate=True
    )
    return labels, counts


@given(st.integers(0, 2**16), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_new_bag_is_a_bag_or_parts_of_two_with_proportions_to_match(seed: int, sizes: list[int]) -> None:
    _, counts = random_batch(seed, sizes)
    batch = batch_of(sizes, counts, counts)
    images, bag_index, target, width = mix(batch, 2.0, torch.Generator().manual_seed(seed))
    own = (counts / counts.sum(dim=1, keepdim=True)).double().numpy()
    torch.testing.assert_close(target.sum(dim=1), torch.ones(len(sizes)))
    for bag in range(len(sizes)):
        inside = images[bag_index == bag]
        assert len(inside.unique()) == len(inside)
        sources = batch.inputs.bag_index[inside]
        drawn = {int(source): int((sources == source).sum()) for source in sources.unique()}
        if drawn == {bag: sizes[bag]}:
            np.testing.assert_allclose(target[bag], own[bag], rtol=1e-6)
            assert (width[bag] == 0).all()
            continue
        assert len(drawn) == 2
        assert 1 <= drawn[bag] < sizes[bag]
        assert sum(drawn.values()) <= sizes[bag]
        share = {source: number / len(inside) for source, number in drawn.items()}
        np.testing.assert_allclose(target[bag], sum(share[s] * own[s] for s in drawn), rtol=1e-5, atol=1e-7)
        spread = sum(share[s] * np.sqrt(own[s] * (1 - own[s]) / drawn[s]) for s in drawn)
        np.testing.assert_allclose(width[bag], 2.0 * spread, rtol=1e-5, atol=1e-7)


def test_expected_proportions_are_those_of_the_mixtures_on_average() -> None:
    """Given how many images come from where, the labels that are drawn average to the target."""
    sizes = [6, 4]
    labels, counts = random_batch(5, sizes)
    batch, generator = batch_of(sizes, counts, counts), torch.Generator().manual_seed(0)
    found: dict[tuple[float, ...], list[torch.Tensor]] = {}
    for _ in range(2000):
        images, bag_index, target, _ = mix(batch, 2.0, generator)
        seen = torch.bincount(labels[images[bag_index == 0]], minlength=3) / (bag_index == 0).sum()
        found.setdefault(tuple(target[0].tolist()), []).append(seen)
    assert len(found) > 3
    for target, seen in found.items():
        mean, error = torch.stack(seen).mean(0), 0.5 / len(seen) ** 0.5
        torch.testing.assert_close(mean, torch.tensor(target), atol=4 * error, rtol=0)


def test_half_of_the_bags_are_mixed() -> None:
    sizes = [5] * 40
    _, counts = random_batch(0, sizes)
    generator = torch.Generator().manual_seed(0)
    mixed = [
        (mix(batch_of(sizes, counts, counts), 2.0, generator)[3] > 0).any(1).float().mean() for _ in range(20)
    ]
    assert float(torch.stack(mixed).mean()) == pytest.approx(0.5, abs=0.06)


def test_the_interval_is_the_normal_one() -> None:
    assert quantile(0.99) == pytest.approx(norm.isf(0.005))
    assert quantile(0.5) == pytest.approx(norm.isf(0.25))


def test_a_class_within_its_interval_costs_nothing() -> None:
    predicted = torch.tensor([[0.5, 0.3, 0.2]])
    target, width = torch.tensor([[0.45, 0.45, 0.1]]), torch.tensor([[0.1, 0.1, 0.1]])
    expected = torch.tensor([[0.0, 0.45 * math.log(0.45 / 0.3), 0.0]])
    torch.testing.assert_close(interval_divergence(predicted, target, width + 1e-6), expected)


def test_the_loss_by_hand() -> None:
    """The bags that the generator's state mixes, as ``mix`` says; the terms from the definition."""
    sizes = [4, 5, 3]
    _, counts = random_batch(1, sizes)
    batch = batch_of(sizes, counts, counts)
    scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    setting = setting_of("mixbag", counts, mixbag_confidence=0.5)
    images, bag_index, target, width = mix(batch, norm.isf(0.25), torch.Generator().manual_seed(4))
    assert 0 < int((width > 0).any(dim=1).sum()) < 3, "some are mixed, some are not"
    p = scores.double().softmax(1).numpy()
    expected = 0.0
    for bag in range(3):
        mean = p[images[bag_index == bag]].mean(axis=0)
        for q, w, predicted in zip(target[bag].tolist(), width[bag].tolist(), mean, strict=True):
            if abs(predicted - q) > w and q > 0:
                expected += q * np.log(q / predicted) / 3
    assert build_objective(setting, 4)(GivenScores(scores), batch).item() == pytest.approx(expected, rel=1e-5)
