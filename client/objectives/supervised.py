"""Bounds from labels: cross-entropy at the leaf, or at every level, on bags of exactly one image.

A bag of one image with its count is a labelled image, so the bound is trained by the same loop, on the same
images and without any label file being opened. Only comparisons may write such a folder, by a minimum bag
size of 1 in its ``site.toml``; in a consortium it would give every label away.
"""

import torch
from torch import Tensor

from client.batch import Batch
from client.objectives.base import Setting
from client.objectives.dllp import LevelProportions
from common.errors import UserError
from common.lhfglp import LHFGLP
from common.losses import proportion_kl


class LeafLabels:
    """Cross-entropy at the leaf, averaged over images."""

    def __init__(self, setting: Setting) -> None:
        refuse_larger_bags(setting)

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """See ``Objective``."""
        # Of one image, KL(label || prediction) is the cross-entropy: the entropy of a label is 0.
        scores = model(batch.images).scores[-1]
        return proportion_kl(scores, batch.bag_index, batch.level_counts[-1]).mean()


class LevelLabels(LevelProportions):
    """Cross-entropy at every level with the weights of ``LossConfig``, averaged over images."""

    def __init__(self, setting: Setting) -> None:
        refuse_larger_bags(setting)
        super().__init__(setting)


def refuse_larger_bags(setting: Setting) -> None:
    """Only bags of one image are labelled.

    Raises:
        UserError: a training bag holds more images.
    """
    larger = int(torch.count_nonzero(setting.leaf_counts.sum(dim=1) != 1))
    if larger:
        raise UserError(
            f"model.method = '{setting.config.model.method.value}' is a bound that needs the label of each "
            f"image, but {larger} training bags of site {setting.site!r} hold more than one image\n"
            "Choose a method that learns from proportions; bounds are for comparisons on labelled data."
        )
