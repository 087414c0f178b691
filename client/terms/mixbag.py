"""Mix bags from parts of two bags, and match them only where their proportions are off (MixBag).

A mixture's proportions are known within an interval only, so it is matched outside of that interval.

Asanomi et al. 2023, "MixBag: bag-level data augmentation for learning from label proportions" (ICCV). Half of
the bags, by a coin each, are replaced by a mixture: g of the m images of bag i (g uniform in 1..m-1) and
m - g of bag j, drawn without replacement. Its proportions are unknown, but expected to be

    q = a q_i + (1 - a) q_j  with  a = g / m
    within  +- z (a s_i + (1 - a) s_j)  with  s^2 = q (1 - q) / images drawn

at the asked confidence. A class whose predicted proportion lies within this interval costs nothing; another
costs its term q_c log(q_c / p_c) of the divergence. A bag that is not mixed costs the divergence itself.

Departures: j is another bag of the same step where the paper draws from all bags, so a step of one bag mixes
nothing; where j has fewer than m - g images, all of them are taken. z enters once (the authors' program
multiplies one of the two terms by it twice).
"""

import statistics

import torch
from pydantic import Field
from torch import Tensor

from client.data.batch import Batch
from client.terms.base import Setting, Step
from common.model.losses import SMALLEST_PREDICTED, bag_mean_probabilities
from common.parts import Kind, Part
from common.settings_file import Section

SHARE = 0.5
"""Chance of a bag to be replaced by a mixture."""


class MixBagSettings(Section):
    """Hold how sure the interval of a mixture's proportions is."""

    confidence: float = Field(
        0.99, gt=0, lt=1, description="confidence of the interval within which a class costs nothing"
    )


class MixedBags:
    """Compute the leaf proportion loss of a batch in which some bags are mixtures."""

    def __init__(self, setting: Setting, settings: MixBagSettings) -> None:
        self.z = quantile(settings.confidence)

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        images, bag_index, target, width = mix(step.batch, self.z, step.generator)
        scores = step.model(step.inputs.take(images, bag_index)).scores[-1]
        predicted = bag_mean_probabilities(scores, bag_index, len(step.batch))
        return interval_divergence(predicted, target, width).sum(dim=1)


def quantile(confidence: float) -> float:
    """Return z such that a standard normal number lies within +-z with this probability."""
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)


def mix(batch: Batch, z: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the images of the new bags, and estimate the proportions of each.

    Args:
        batch: B bags.
        z: half width of the interval in standard deviations.
        generator: on the CPU.

    Returns:
        Positions of images in the batch (M,), and the new bag of each, 0..B-1 (M,); expected proportions
        (B, C); half widths of the interval (B, C), 0 for a bag that is not mixed.
    """
    counts = batch.level_counts[-1]
    proportions = counts / counts.sum(dim=1, keepdim=True)
    sizes = torch.bincount(batch.inputs.bag_index).tolist()
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    coins = (torch.rand(len(batch), generator=generator) < SHARE).tolist()
    target, width = proportions.clone(), torch.zeros_like(proportions)
    chosen = []

    def draw(bag: int, number: int) -> Tensor:
        return torch.randperm(sizes[bag], generator=generator)[:number].add_(starts[bag])

    for bag, size in enumerate(sizes):
        if not coins[bag] or size < 2 or len(batch) < 2:
            chosen.append(torch.arange(starts[bag], starts[bag + 1]))
            continue
        other = int(torch.randint(len(batch) - 1, (), generator=generator))
        # Drawn from one number fewer and moved up by one, so that a bag is never mixed with itself.
        other += other >= bag
        own = int(torch.randint(1, size, (), generator=generator))
        lent = min(size - own, sizes[other])
        chosen.append(torch.cat([draw(bag, own), draw(other, lent)]))
        share = own / (own + lent)
        target[bag] = share * proportions[bag] + (1 - share) * proportions[other]
        width[bag] = z * (
            share * deviation(proportions[bag], own) + (1 - share) * deviation(proportions[other], lent)
        )
    new_index = torch.repeat_interleave(torch.tensor([len(images) for images in chosen]))
    device = batch.inputs.bag_index.device
    return torch.cat(chosen).to(device), new_index.to(device), target, width


def deviation(proportions: Tensor, drawn: int) -> Tensor:
    """Return the standard deviation of the proportions among ``drawn`` independent images."""
    return (proportions * (1 - proportions) / drawn).sqrt()


def interval_divergence(predicted: Tensor, target: Tensor, width: Tensor) -> Tensor:
    """Return the terms of KL(target || predicted) per class, 0 where predicted is within target +- width.

    All tensors have shape (B, C).
    """
    terms = torch.xlogy(target, target) - target * predicted.clamp_min(SMALLEST_PREDICTED).log()
    return terms.masked_fill((predicted - target).abs() <= width, 0.0)


PART = Part(
    Kind.TERM,
    "mixbag",
    MixedBags,
    "MixBag, Asanomi et al. 2023; our own code, Apache-2.0",
    MixBagSettings,
)
