"""Make predictions withstand small adversarial changes, beside proportion matching (LLP-VAT).

Tsai & Lin 2020, "Learning from label proportions with consistency regularization", eq. 5-7:

    KL(q_b || p_b) + w * KL(p(x) || p(x + r)), averaged over images and then over bags
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
from pydantic import Field
from torch import Tensor

from client.terms.base import Setting, Step
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.model.losses import bag_means
from common.parts import Kind, Part
from common.settings_file import Section

XI = 0.1
"""Norm of the change at which the power iteration measures the curvature."""
RAMP = 0.4
"""Share of the run over which the weight rises."""


class VATSettings(Section):
    """Hold the weight and the reach of the consistency."""

    weight: float = Field(0.05, ge=0, le=100, description="weight of the consistency, final")
    radius: float = Field(3.0, gt=0, le=1e4, description="norm of an image's change; pixels are in [-1, 1]")


class VirtualAdversarial:
    """Compute the local smoothness of the leaf predictions, times its weight."""

    def __init__(self, setting: Setting, settings: VATSettings) -> None:
        self.weight = settings.weight * ramp(setting.progress)
        self.radius = settings.radius

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        inputs = step.inputs
        if not self.weight:
            return torch.zeros(len(step.batch), device=inputs.bag_index.device)
        target = F.log_softmax(step.output.scores[-1].detach().float(), dim=1)
        noise = torch.randn(inputs.images.shape, generator=step.generator).to(inputs.images)
        change = adversarial_change(step.model, inputs, target, noise, self.radius)
        moved = divergences(step.model, inputs.with_images(inputs.images + change), target)
        return self.weight * bag_means(moved, inputs.bag_index, len(step.batch))


def ramp(progress: float) -> float:
    """Return exp(-5 (1 - t)^2) with t = progress / RAMP, at most 1, which rises from 0.007 to 1."""
    return math.exp(-5 * (1 - min(progress / RAMP, 1.0)) ** 2)


def adversarial_change(
    model: HierarchicalClassifier, inputs: Inputs, target: Tensor, noise: Tensor, radius: float
) -> Tensor:
    """Return the change of each image that moves its prediction most, to second order.

    Args:
        model: its parameters get no gradient from here.
        inputs: N images (N, 3, S, S).
        target: log-probabilities of the unchanged images, shape (N, C_L), without a graph.
        noise: the random start, shape of the images.
        radius: eps, the Euclidean norm over a whole image.

    Returns:
        Shape of the images, each of norm ``radius``; 0 where the prediction does not depend on the image.
    """
    start = (XI * unit(noise)).requires_grad_()
    moved = divergences(model, inputs.with_images(inputs.images + start), target)
    # A backbone may be no differentiable function of the image (colour-histogram): then nothing moves.
    (gradient,) = torch.autograd.grad(moved.mean(), start, materialize_grads=True)
    return radius * unit(gradient)


def divergences(model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Tensor:
    """Return KL(target || prediction) at the leaf of every image, shape (N,).

    Args:
        model: predicts from the inputs.
        inputs: N images.
        target: log-probabilities, shape (N, C_L).
    """
    predicted = F.log_softmax(model(inputs).scores[-1].float(), dim=1)
    return F.kl_div(predicted, target, reduction="none", log_target=True).sum(dim=1)


def unit(images: Tensor) -> Tensor:
    """Divide each image by its Euclidean norm, leaving an image of zeros as it is."""
    norm = images.flatten(1).norm(dim=1).clamp_min(torch.finfo(images.dtype).tiny)
    scaled: Tensor = images / norm.view(-1, 1, 1, 1)
    return scaled


PART = Part(
    Kind.TERM,
    "vat",
    VirtualAdversarial,
    "LLP-VAT, Tsai & Lin 2020; Miyato et al. 2018; our own code, Apache-2.0",
    VATSettings,
)
