"""Measure finished models of a comparison by parts that can be exchanged, and by recall of similar images.

A probe looks at a model and labelled test images once a cell is trained, so it has no say in the training. It
never runs at a hospital and is no part of the approved app. This module knows nothing of scenarios or tables.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.data.images import to_tensor
from client.data.labelled import LabelledImages
from common.errors import UserError
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.parts import Kind, NoSettings, Part, part

_IMAGES_AT_ONCE = 256
_EQUALLY_NEAR = 1e-6
"""Difference of two cosine similarities that rounding may explain."""


class Probe(Protocol):
    """Measure a trained model on labelled test images."""

    def __call__(
        self, model: HierarchicalClassifier, test: LabelledImages, device: torch.device
    ) -> dict[str, float]:
        """Return finite figures by name, at least one.

        They must not depend on the order of the images. Each image is looked at in a bag of its own
        (``Inputs.alone``).

        Args:
            model: on the device, in evaluation mode; to be left as it is.
            test: the test images, at the size of the model's input.
            device: where the model runs.
        """
        ...


def measure(
    names: Iterable[str], model: HierarchicalClassifier, test: LabelledImages, device: torch.device
) -> dict[str, float]:
    """Return the figures of probes by column, such as ``recall.leaf@1``.

    Raises:
        ConfigError: there is no such probe.
        UserError: a probe gives no figure, or one that is no number.
    """
    columns: dict[str, float] = {}
    for name in names:
        found = part(Kind.PROBE, name)
        probe: Probe = found.build(found.settings())
        figures = {key: float(value) for key, value in probe(model.to(device).eval(), test, device).items()}
        if not figures or not all(map(math.isfinite, figures.values())):
            raise UserError(f"probe {name!r} gave {figures}: it has to give figures, all of them finite")
        columns |= {f"{name}.{key}": value for key, value in figures.items()}
    return columns


@torch.no_grad()
def pooled_features(model: HierarchicalClassifier, images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return the backbone's pooled features (N, d), float32 on the CPU, of images (N, S, S, 3) uint8."""
    return torch.cat(
        [
            model.backbone(Inputs.alone(to_tensor(images[start : start + _IMAGES_AT_ONCE]).to(device)))
            .pooled.float()
            .cpu()
            for start in range(0, len(images), _IMAGES_AT_ONCE)
        ]
    )


class _Recall:
    """Count how often the most similar other image is of the same leaf: recall@1 (Jegou et al. 2011).

    Similarity is the cosine of the pooled features. Where several images are equally near, as after a
    collapse of the features, their share of the right leaf counts, so that no order of the images decides.
    """

    def __init__(self, settings: NoSettings) -> None:
        pass

    def __call__(
        self, model: HierarchicalClassifier, test: LabelledImages, device: torch.device
    ) -> dict[str, float]:
        """Return ``leaf@1`` in [0, 1]; an image without any other is a miss."""
        return {"leaf@1": _recall_at_1(pooled_features(model, test.images, device), test.labels)}


def _recall_at_1(features: Tensor, labels: NDArray[np.int64]) -> float:
    """Return the share of the images whose nearest other one has the same label.

    Args:
        features: shape (N, d), N >= 1; nearness is the cosine.
        labels: shape (N,).
    """
    # A similarity in float64 is the same to many digits, whichever rows are multiplied together.
    unit, label = F.normalize(features.double(), dim=1), torch.as_tensor(labels)
    if len(unit) < 2:
        return 0.0
    hits = 0.0
    # In pieces, because the similarities of all pairs would take more memory than the training.
    for rows in torch.split(torch.arange(len(unit)), _IMAGES_AT_ONCE):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        near = similarity >= similarity.amax(dim=1, keepdim=True) - _EQUALLY_NEAR
        right = near & (label[rows, None] == label[None, :])
        hits += float((right.sum(dim=1) / near.sum(dim=1)).sum())
    return hits / len(unit)


PART = Part(
    Kind.PROBE,
    "recall",
    _Recall,
    "recall@1 as in Jegou, Douze & Schmid 2011, doi 10.1109/TPAMI.2010.57; our own code, Apache-2.0",
)
