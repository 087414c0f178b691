"""Score the classes of one level by a linear layer on the pooled feature."""

from collections.abc import Mapping

from torch import Tensor, nn

from common.model.interfaces import Features, Level
from common.parts import Kind, NoSettings, Part


class LinearHead(nn.Linear):
    """Map the pooled feature (N, d) to scores (N, C_l)."""

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        """Return the scores, and no evidence."""
        return super().forward(features.pooled), {}


def _build(level: Level, settings: NoSettings) -> LinearHead:
    return LinearHead(level.n_features, level.n_classes)


LINEAR = Part(Kind.HEAD, "linear", _build, "our own code, Apache-2.0")
