"""Find soft labels of a bag's images that add up to its counts, by entropic optimal transport.

For a bag of m images with counts n and predictions p, Sinkhorn's scaling (Cuturi 2013) of p^(1/tau):

    Q = argmin over Q >= 0, Q 1 = 1, Q^T 1 = n  of  -sum_ic Q_ic log p_ic + tau sum_ic Q_ic log Q_ic
      = diag(u) p^(1/tau) diag(v)

With tau = 1 it approximates, in the manner of Bethe, the probability of each label given the bag's counts
(an E-step); tau to 0 gives the likeliest hard labels with exactly these counts. Knows nothing of models.
"""

import torch
from torch import Tensor

MOST_STEPS = 100
"""Sinkhorn's steps at most; with predictions far from sure a few do."""
TOLERANCE = 0.01
"""Images by which a class's sum may miss its count when the scaling stops."""
FARTHEST = -300.0
"""Exponent below that of an image's likeliest class from which on classes are equally unlikely: so the plan's
scales stay within float64."""


def pseudo_labels(predicted: Tensor, bag_index: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Return the transport plan of every bag, one row of class weights per image.

    Args:
        predicted: log-probabilities, shape (N, C), without a graph.
        bag_index: shape (N,), int64; the images of a bag are consecutive.
        counts: shape (B, C); a row sums to the images of its bag.
        temperature: tau > 0.

    Returns:
        Shape (N, C), dtype of ``predicted``: rows sum to 1; the rows of a bag sum to its counts, within
        TOLERANCE or what MOST_STEPS steps reach; exactly 0 for a class of count 0.
    """
    sizes = torch.bincount(bag_index, minlength=len(counts))
    there = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    # In float64: the scales of the plan span hundreds of orders of magnitude at low temperatures.
    scaled = predicted.double() / temperature
    kernel = scaled.new_zeros(*there.shape, counts.shape[1])  # no mass beyond a bag's images
    # Each row is scaled by its own largest entry, which Sinkhorn's scaling takes out again, so that no
    # row vanishes in exp.
    kernel[there] = (scaled - scaled.amax(dim=1, keepdim=True)).clamp_min(FARTHEST).exp()
    target, rows = counts.double()[:, None], there.double()[:, None]
    columns = torch.ones_like(target)
    moving = torch.ones_like(target[..., :1], dtype=torch.bool)
    for _ in range(MOST_STEPS):
        # A bag that has arrived stays: what becomes of it must not depend on the other bags of the batch.
        columns = torch.where(moving, target / (rows @ kernel), columns)
        rows = torch.where(moving, torch.where(there[:, None], 1 / (columns @ kernel.mT), 0.0), rows)
        missed = (columns * (rows @ kernel) - target).abs().amax(dim=2, keepdim=True)
        moving = missed > TOLERANCE
        if not moving.any():
            break
    plan = rows.mT * kernel * columns
    return plan[there].to(predicted.dtype)
