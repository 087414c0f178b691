"""Offer a loss term that asks for sharp predictions, and a head that compares directions."""

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from client.terms.base import Setting, Step
from common.model.interfaces import Features, Level
from common.model.losses import bag_means
from common.parts import Kind, NoSettings, Part
from common.settings_file import Section


class EntropySettings(Section):
    """Hold how much sharpness counts."""

    weight: float = Field(0.1, ge=0, le=100, description="weight of the entropy")


class Entropy:
    """Compute the mean entropy of a bag's leaf predictions (Grandvalet & Bengio 2004), times its weight."""

    def __init__(self, setting: Setting, settings: EntropySettings) -> None:
        self.weight = settings.weight

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        predicted = step.log_probabilities[-1]
        entropy = -(predicted.exp() * predicted).sum(dim=1)
        return self.weight * bag_means(entropy, step.inputs.bag_index, len(step.batch))


class CosineHead(nn.Module):
    """Score classes by the cosine between the feature and a direction for each (Gidaris & Komodakis 2018)."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.directions = nn.Linear(n_features, n_classes, bias=False)

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return scores (N, C), at most 10 in absolute value, and the cosines as evidence."""
        # Scaled here and not in place: what training writes into a parameter by itself would carry no noise.
        directions = F.normalize(self.directions.weight, dim=1)
        cosines = F.normalize(features.pooled, dim=1) @ directions.T
        return 10 * cosines, {"cosines": cosines}


def _head(level: Level, settings: NoSettings) -> CosineHead:
    return CosineHead(level.n_features, level.n_classes)


PARTS = (
    Part(Kind.TERM, "entropy", Entropy, "Grandvalet & Bengio 2004; Apache-2.0", EntropySettings),
    Part(Kind.HEAD, "cosine", _head, "Gidaris & Komodakis 2018; Apache-2.0"),
)
