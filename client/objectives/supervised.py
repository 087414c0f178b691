"""Train upper bounds from labels, with cross-entropy on bags of exactly one image.

The cross-entropy is taken at the leaf or at every level.

A bag of one image with its count is a labelled image, so the bound is trained by the same loop, on the same
images and without any label file being opened. Only comparisons may write such a folder, by a minimum bag
size of 1 in its ``site.toml``; in a consortium it would give every label away. Of one image,
KL(label || prediction) is the cross-entropy, for a label has no entropy: the losses are those of bags.
"""

import torch

from client.objectives.base import Setting
from client.objectives.dllp import LeafProportions, LevelProportions
from common.errors import UserError


class LeafLabels(LeafProportions):
    """Compute the cross-entropy at the leaf, averaged over images."""

    def __init__(self, setting: Setting) -> None:
        refuse_larger_bags(setting)
        super().__init__(setting)


class LevelLabels(LevelProportions):
    """Compute the cross-entropy at every level with the weights of ``LossConfig``, averaged over images."""

    def __init__(self, setting: Setting) -> None:
        refuse_larger_bags(setting)
        super().__init__(setting)


def refuse_larger_bags(setting: Setting) -> None:
    """Refuse a site with a training bag of more than one image, which gives no label.

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
