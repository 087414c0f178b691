"""Combine proportion matching with predictions that withstand small adversarial changes (LLP-VAT).

Tsai & Lin 2020, "Learning from label proportions with consistency regularization", eq. 5-7:

    KL(q_b || p_b), averaged over bags, + w * KL(p(x) || p(x + r)), averaged over images
    r = argmax over ||r|| <= eps of KL(p(x) || p(x + r))

r by one step of the power iteration of virtual adversarial training (Miyato et al. 2018, eq. 8-12); p(x) is a
constant of the second term. w rises as exp(-5 (1 - t)^2) over the first 40 % of the run, t in [0, 1].

Departures: the length XI of the power iteration's change is 0.1 where the paper's program has 1e-6, which
float32 images of a few thousand pixels round away; the default radius is the program's 6 in units of one
standard deviation of the pixels, taken to be a quarter of the pixel range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from client.data.batch import Batch
from client.objectives.base import Setting
from common.model.lhfglp import LHFGLP
from common.model.losses import proportion_kl

XI = 0.1
"""Norm of the change at which the power iteration measures the curvature."""
RAMP = 0.4
"""Share of the run over which the weight rises."""


class VirtualAdversarial:
    """Add the local smoothness of the leaf predictions to the leaf proportion loss."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config.objective
        self.weight = config.vat_weight * ramp(setting.progress)
        self.radius = config.vat_radius
        self.generator = setting.generator

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss of a batch, as ``Objective`` describes."""
        scores = model(batch.images).scores[-1]
        loss = proportion_kl(scores, batch.bag_index, batch.level_counts[-1]).mean()
        if not self.weight:
            return loss
        target = F.log_softmax(scores.detach().float(), dim=1)
        noise = torch.randn(batch.images.shape, generator=self.generator).to(batch.images)
        change = adversarial_change(model, batch.images, target, noise, self.radius)
        return loss + self.weight * divergence(model, batch.images + change, target)


def ramp(progress: float) -> float:
    """Return exp(-5 (1 - t)^2) with t = progress / RAMP, at most 1, which rises from 0.007 to 1."""
    return math.exp(-5 * (1 - min(progress / RAMP, 1.0)) ** 2)


def adversarial_change(model: LHFGLP, images: Tensor, target: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Return the change of each image that moves its prediction most, to second order.

    Args:
        model: its parameters get no gradient from here.
        images: shape (N, 3, S, S).
        target: log-probabilities of the unchanged images, shape (N, C_L), without a graph.
        noise: the random start, shape of the images.
        radius: eps, the Euclidean norm over a whole image.

    Returns:
        Shape of the images, each of norm ``radius``; 0 where the prediction does not depend on the image.
    """
    start = (XI * unit(noise)).requires_grad_()
    # A backbone may be no differentiable function of the image (colour-histogram): then nothing moves.
    (gradient,) = torch.autograd.grad(
        divergence(model, images + start, target), start, materialize_grads=True
    )
    return radius * unit(gradient)


def divergence(model: LHFGLP, images: Tensor, target: Tensor) -> Tensor:
    """Return KL(target || prediction) at the leaf, averaged over images.

    Args:
        model: predicts from the images.
        images: shape (N, 3, S, S).
        target: log-probabilities, shape (N, C_L).
    """
    predicted = F.log_softmax(model(images).scores[-1].float(), dim=1)
    return F.kl_div(predicted, target, reduction="batchmean", log_target=True)


def unit(images: Tensor) -> Tensor:
    """Divide each image by its Euclidean norm, leaving an image of zeros as it is."""
    norm = images.flatten(1).norm(dim=1).clamp_min(torch.finfo(images.dtype).tiny)
    scaled: Tensor = images / norm.view(-1, 1, 1, 1)
    return scaled
