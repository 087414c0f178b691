"""Train upper bounds from labels: cross-entropy on bags of exactly one image.

A bag of one image with its count is a labelled image, so the bound is trained by the same loop, on the same
images and without any label file being opened. Only comparisons may write such a folder, by a minimum bag
size of 1 in its ``site.toml``; in a consortium it would give every label away. Of one image,
KL(label || prediction) is the cross-entropy, for a label has no entropy: the term is that of bags.
"""

import torch

from client.terms.base import Setting
from client.terms.proportions import Matching
from common.errors import UserError
from common.parts import Kind, NoSettings, Part


class Labels(Matching):
    """Compute the cross-entropy at the levels that have a head.

    Raises:
        UserError: a training bag holds more than one image, which gives no label.
    """

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        larger = int(torch.count_nonzero(setting.whole_site.leaf_counts.sum(dim=1) != 1))
        if larger:
            raise UserError(
                f"model.method = '{setting.config.model.method}' is a bound that needs the label of each "
                f"image, but {larger} training bags of site {setting.site!r} hold more than one image\n"
                "Choose a method that learns from proportions; bounds are for comparisons on labelled data."
            )
        super().__init__(setting, settings)


PART = Part(Kind.TERM, "labels", Labels, "cross-entropy; our own code, Apache-2.0")
