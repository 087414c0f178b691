"""A probe that measures how sure a model is of the leaf that it predicts."""

import torch

from client.data.images import to_tensor
from client.data.labelled import LabelledImages
from common.model.classifier import HierarchicalClassifier, log_probabilities
from common.model.interfaces import Inputs
from common.parts import Kind, NoSettings, Part


class Confidence:
    """The mean probability of the likeliest leaf."""

    def __init__(self, settings: NoSettings) -> None:
        pass

    @torch.no_grad()
    def __call__(
        self, model: HierarchicalClassifier, test: LabelledImages, device: torch.device
    ) -> dict[str, float]:
        output = model(Inputs.alone(to_tensor(test.images).to(device)))
        return {"mean": float(log_probabilities(output)[-1].exp().amax(dim=1).mean())}


PART = Part(Kind.PROBE, "confidence", Confidence, "a test")
