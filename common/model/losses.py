"""Compute how far the mean prediction of a bag is from its label counts.

All functions are pure. Images of several bags lie one after the other; ``bag_index`` gives the bag of each,
so bags may differ in size. Everything is computed in float32 whatever autocast does. This module knows
nothing of models, files or sites.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config_tables import LossConfig

SMALLEST_PREDICTED = 1e-7
"""Predicted proportions are floored here inside the logarithm: a class predicted exactly 0 costs at most
16 nats instead of infinity, and its gradient stays finite."""


def bag_means(values: Tensor, bag_index: Tensor, n_bags: int) -> Tensor:
    """Return the mean over the images of each bag.

    Args:
        values: shape (N,) or (N, C).
        bag_index: shape (N,), int64 in [0, n_bags), every bag at least once.
        n_bags: B.

    Returns:
        Shape (B,) or (B, C), float32 (float64 stays float64).
    """
    # Under autocast the values are half precision, which would round a sum over a large bag.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    totals = values.new_zeros((n_bags, *values.shape[1:])).index_add(0, bag_index, values)
    sizes = torch.bincount(bag_index, minlength=n_bags).to(values.dtype)
    return totals / sizes.view(-1, *[1] * (values.dim() - 1))


def bag_mean_probabilities(scores: Tensor, bag_index: Tensor, n_bags: int) -> Tensor:
    """Return the predicted proportions of each bag, (B, C).

    They are the mean of softmax(scores) over its images.

    Args:
        scores: shape (N, C); log-probabilities serve as scores.
        bag_index: shape (N,), int64.
        n_bags: B.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return bag_means(F.softmax(scores, dim=1), bag_index, n_bags)


def _proportions(counts: Tensor, like: Tensor) -> Tensor:
    counts = counts.to(like.dtype)
    return counts / counts.sum(dim=1, keepdim=True)


def proportion_kl(scores: Tensor, bag_index: Tensor, counts: Tensor) -> Tensor:
    """Return KL(q_b || p_b) per bag, in nats.

    It is 0 at a perfect fit.

    Proportion matching (Ardehaly & Culotta 2017), up to the entropy of q, constant in the parameters. A class
    absent from the bag contributes 0, since x log x goes to 0.

    Args:
        scores: shape (N, C).
        bag_index: shape (N,), int64.
        counts: shape (B, C), non-negative; each row sums to more than 0.

    Returns:
        Shape (B,), >= 0 up to rounding.
    """
    predicted = bag_mean_probabilities(scores, bag_index, len(counts))
    target = _proportions(counts, predicted)
    divergence = torch.xlogy(target, target) - target * predicted.clamp_min(SMALLEST_PREDICTED).log()
    return divergence.sum(dim=1)


def proportion_l1(scores: Tensor, bag_index: Tensor, counts: Tensor) -> Tensor:
    """Return the sum over classes of |q_b - p_b| per bag, shape (B,), in [0, 2].

    The arguments are those of ``proportion_kl``.
    """
    predicted = bag_mean_probabilities(scores, bag_index, len(counts))
    return (predicted - _proportions(counts, predicted)).abs().sum(dim=1)


def level_divergence(
    scores: Sequence[Tensor],
    bag_index: Tensor,
    level_counts: Sequence[Tensor],
    level_weights: Sequence[float],
) -> Tensor:
    """Return sum_l w_l KL_l per bag, shape (B,).

    Args:
        scores: per level (N, C_l).
        bag_index: shape (N,), int64.
        level_counts: per level the counts, shape (B, C_l).
        level_weights: w_l >= 0 per level; a level of weight 0 costs nothing.
    """
    per_bag = torch.zeros(len(level_counts[0]), device=bag_index.device)
    for level, counts, weight in zip(scores, level_counts, level_weights, strict=True):
        if weight:
            per_bag = per_bag + weight * proportion_kl(level, bag_index, counts)
    return per_bag


def refined_label_loss(
    log_probabilities: Sequence[Tensor],
    bag_index: Tensor,
    leaf_labels: Tensor,
    leaf_paths: Tensor,
    level_weights: Sequence[float],
) -> Tensor:
    """Return the cross-entropy between refined labels and predictions per bag.

    It is sum_l w_l times the mean over a bag's images of -sum_c Q_{i,l,c} log p_{i,l,c}.

    The labels of a coarse level are those of the leaves summed up the tree, as its counts are.

    Args:
        log_probabilities: per level, shape (N, C_l).
        bag_index: shape (N,), int64; the images of a bag are consecutive.
        leaf_labels: Q at the leaf, shape (N, C_L), rows sum to 1; without a graph.
        leaf_paths: shape (C_L, L) int64, the class of each leaf at every level.
        level_weights: w_l >= 0 per level; a level of weight 0 costs nothing.

    Returns:
        Shape (B,).
    """
    per_image = leaf_labels.new_zeros(len(leaf_labels))
    for level, (predicted, weight) in enumerate(zip(log_probabilities, level_weights, strict=True)):
        if weight:
            labels = torch.zeros_like(predicted).index_add(1, leaf_paths[:, level], leaf_labels)
            per_image = per_image - weight * (labels * predicted).sum(dim=1)
    return bag_means(per_image, bag_index, int(bag_index[-1]) + 1)


def level_weights(config: LossConfig, levels: int, progress: float) -> tuple[float, ...]:
    """Return the weight of each level, coarse to fine, where the leaf's is 1.

    Args:
        config: coarse weights fall linearly from ``anneal_from`` to ``coarse_weight`` over the first
            ``anneal_share`` of the run, then stay.
        levels: L >= 1.
        progress: share of the run that is done, in [0, 1].
    """
    passed = min(progress / config.anneal_share, 1.0) if config.anneal_share else 1.0
    coarse = config.anneal_from + passed * (config.coarse_weight - config.anneal_from)
    return (coarse,) * (levels - 1) + (1.0,)
