"""An explainer that looks at nothing: a bump in the middle of every image, and a frame around it."""

import torch
from torch import Tensor

from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.parts import Kind, NoSettings, Part
from deploy.explain import Explanation, Reason


class Centre:
    """The control that a real explainer has to beat."""

    def __init__(self, settings: NoSettings) -> None:
        pass

    def __call__(self, model: HierarchicalClassifier, inputs: Inputs, target: Tensor) -> Explanation:
        across = torch.linspace(-1, 1, inputs.images.shape[-1])
        bump = torch.exp(-4 * (across[:, None] ** 2 + across[None, :] ** 2))
        middle = [(Reason("middle", leaf, 1.0, (0.25, 0.25, 0.75, 0.75)),) for leaf in target.tolist()]
        return Explanation(bump.expand(len(inputs), -1, -1), tuple(middle))


PART = Part(Kind.EXPLAINER, "centre", Centre, "a test")
