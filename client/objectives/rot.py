"""ROT: pseudo-labels by entropic optimal transport that keep each bag's counts, beside proportion matching.

Optimal transport between a bag's images and its counts as a loss is due to Dulac-Arnold et al. 2019, "Deep
multi-class learning from label proportions" (ROT); training on the plan as pseudo-labels to Liu et al. 2021,
"Two-stage training for learning from label proportions". For a bag of m images with counts n:

    Q = argmin over Q >= 0, Q 1 = 1, Q^T 1 = n  of  -sum_ic Q_ic log p_ic + tau sum_ic Q_ic log Q_ic
    loss = KL(n / m || mean_i p_i) - w / m sum_ic Q_ic log p_ic, averaged over bags; Q is a constant

Q = diag(u) p^(1/tau) diag(v) by Sinkhorn's scaling. With tau = 1 and plan and prediction in agreement it is
what an E-step would give; tau to 0 gives the best hard labels with exactly the bag's counts.

Departures: the counts are exact, so the marginal of the classes is kept and not relaxed as in ROT. Of the two
stages only the losses are kept: both terms act from the start and Q is made anew in every step. Plain
cross-entropy takes the place of Liu et al.'s symmetric one, and there is no mixup.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from client.batch import Batch
from client.objectives.base import Setting
from common.lhfglp import LHFGLP
from common.losses import bag_means, proportion_kl

MOST_STEPS = 100
"""Sinkhorn's steps at most; with predictions far from sure a few do."""
TOLERANCE = 0.01
"""Images by which a class's sum may miss its count when the scaling stops."""
FARTHEST = -300.0
"""Exponent below that of an image's likeliest class from which on classes are equally unlikely: so the plan's
scales stay within float64."""


class TransportedLabels:
    """The leaf proportion loss plus the cross-entropy against transported pseudo-labels."""

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config.objective

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """See ``Objective``."""
        scores, counts = model(batch.images).scores[-1], batch.level_counts[-1]
        predicted = F.log_softmax(scores.float(), dim=1)
        labels = pseudo_labels(predicted.detach(), batch.bag_index, counts, self.config.rot_temperature)
        cross_entropy = bag_means(-(labels * predicted).sum(dim=1), batch.bag_index, len(batch))
        matching = proportion_kl(scores, batch.bag_index, counts)
        return (matching + self.config.rot_weight * cross_entropy).mean()


def pseudo_labels(predicted: Tensor, bag_index: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """The transport plan of every bag, one row of class weights per image.

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
    scaled = predicted.double() / temperature
    kernel = scaled.new_zeros(*there.shape, counts.shape[1])  # no mass beyond a bag's images
    kernel[there] = (scaled - scaled.amax(dim=1, keepdim=True)).clamp_min(FARTHEST).exp()
    target, rows = counts.double()[:, None], there.double()[:, None]
    reached = rows @ kernel
    for _ in range(MOST_STEPS):
        columns = target / reached
        rows = torch.where(there[:, None], 1 / (columns @ kernel.mT), 0.0)
        reached = rows @ kernel
        if (columns * reached - target).abs().max() <= TOLERANCE:
            break
    plan = rows.mT * kernel * columns
    return plan[there].to(predicted.dtype)
