"""Estimate the loss of every image without bias from its bag's counts and the class priors (EasyLLP).

Busa-Fekete et al. 2023, "Easy learning from label proportions" (arXiv 2302.03115), the debiased loss, in its
multi-class form. In a bag of k independent images with proportions q, and class priors pi, the expectation
of k q_c given one image x is P(c | x) + (k - 1) pi_c. So

    sum_c (k q_c - (k - 1) pi_c) l(p(x), c), averaged over a bag's images

has the expectation of the loss l under the unknown labels. The weights sum to 1 and may be negative.

Departures: l is the squared error |p - e_c|^2 (Brier), which is bounded. The logarithmic loss with negative
weights is not bounded from below, and training on it runs away. The priors are the proportions of the site's
own training bags.
"""

import torch.nn.functional as F
from torch import Tensor

from client.terms.base import Setting, Step
from common.model.losses import bag_means
from common.parts import Kind, NoSettings, Part


class DebiasedLoss:
    """Average the squared error of each image against its debiased label over a bag's images."""

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        counts = setting.whole_site.leaf_counts
        self.priors = counts.sum(dim=0) / counts.sum()

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        bag_index = step.inputs.bag_index
        weights = debiased_labels(step.batch.level_counts[-1], self.priors)[bag_index]
        predicted = F.softmax(step.output.scores[-1].float(), dim=1)
        per_image = (weights * squared_errors(predicted)).sum(dim=1)
        return bag_means(per_image, bag_index, len(step.batch))


def debiased_labels(counts: Tensor, priors: Tensor) -> Tensor:
    """Return k q - (k - 1) pi for every bag, the weight of each class for each of its images.

    Args:
        counts: k q, shape (B, C); a row sums to k >= 1.
        priors: pi, shape (C,), sums to 1.

    Returns:
        Shape (B, C); rows sum to 1; entries from -(k - 1) to k. With k = 1 the label itself.
    """
    return counts - (counts.sum(dim=1, keepdim=True) - 1) * priors


def squared_errors(predicted: Tensor) -> Tensor:
    """Return |p - e_c|^2 for every image and class c, shape (N, C), in [0, 2]."""
    # Expanded, since |p - e_c|^2 = |p|^2 - 2 p_c + 1 needs no tensor of shape (N, C, C).
    return predicted.square().sum(dim=1, keepdim=True) - 2 * predicted + 1


PART = Part(
    Kind.TERM,
    "easyllp",
    DebiasedLoss,
    "EasyLLP, Busa-Fekete et al. 2023, arXiv 2302.03115; our own code, Apache-2.0",
)
