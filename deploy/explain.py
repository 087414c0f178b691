"""Explain the predictions of a trained model by parts that can be exchanged, and by Grad-CAM.

An explainer looks at a finished model and images that are at hand, so it never runs at a hospital and is no
part of the approved app. This module knows nothing of pictures, files or runs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.parts import Kind, NoSettings, Part, part

GRAD_CAM = "grad-cam"


class NoExplanation(Exception):  # noqa: N818  (a finding, not a fault: the picture is left out)
    """Signal that a model lacks what the explainer looks at.

    The text ends a sentence that begins with the name of the model's backbone.
    """


@dataclass(frozen=True)
class Reason:
    """Hold one reason for or against a class, such as a prototype that an image resembles."""

    name: str
    leaf: int
    """The class that it speaks for."""
    value: float
    """How strongly, in the explainer's own unit; below 0 it speaks against the class."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the place, as fractions of the image; None where it has no place."""


@dataclass(frozen=True)
class Explanation:
    """Hold what led a model to N targets."""

    maps: Tensor
    """Shape (N, S, S) float32 in [0, 1]: how much each position speaks for the target."""
    reasons: tuple[tuple[Reason, ...], ...] | None = None
    """Per image, the strongest first; None from explainers that have maps alone."""


class Explainer(Protocol):
    """Explain why a model would give images a class."""

    def __call__(self, model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Explanation:
        """Return the explanation of one leaf for each of N images.

        Args:
            model: in evaluation mode; to be left as it is.
            inputs: on the model's device.
            target: the leaf to explain, shape (N,) int64, right or not.

        Raises:
            NoExplanation: the model lacks what this explainer looks at.
        """
        ...


def explain(name: str, model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Explanation:
    """Return the explanation that the explainer of this name gives.

    Raises:
        ConfigError: there is no such explainer.
        UserError: what it gives is no explanation.
        NoExplanation: see Explainer.
    """
    found = part(Kind.EXPLAINER, name)
    explainer: Explainer = found.build(found.settings())
    explanation = explainer(model, inputs, target)
    maps, reasons = explanation.maps.detach().float().cpu(), explanation.reasons
    wanted = (len(inputs), *inputs.images.shape[-2:])
    # Written so that NaN is refused, too.
    if tuple(maps.shape) != wanted or not bool(((maps >= 0) & (maps <= 1)).all()):
        raise UserError(f"explainer {name!r} gave maps that are not of shape {wanted} in [0, 1]")
    if reasons is not None and len(reasons) != len(inputs):
        raise UserError(f"explainer {name!r} gave reasons for {len(reasons)} of {len(inputs)} images")
    return Explanation(maps, reasons)


class _GradCam:
    """Weigh each channel of the backbone's map by its mean gradient (Selvaraju et al. 2017).

    Works with every backbone that has a map. A ViT has none.
    """

    def __init__(self, settings: NoSettings) -> None:
        pass

    def __call__(self, model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Explanation:
        """Return maps whose largest value is 1 in each image, or all 0."""
        # The maps need gradients, whatever mode the caller is in.
        with torch.enable_grad():
            output = model(inputs)
            # Each image is in a bag of its own, so the sum's gradient is every image's.
            score = output.scores[-1].gather(1, target[:, None]).sum()
        features = output.features.map
        if features is None or not features.requires_grad:
            raise NoExplanation("has no feature map to look at")
        (gradient,) = torch.autograd.grad(score, features)
        features = features.detach()
        # Not position by position: that would show the grid of strided convolutions.
        seen = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True))
        maps = F.interpolate(seen, inputs.images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return Explanation(maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12))


PART = Part(
    Kind.EXPLAINER,
    GRAD_CAM,
    _GradCam,
    "Grad-CAM, Selvaraju et al. 2017, arXiv 1610.02391; our own code, Apache-2.0",
)
