"""List the training methods and declare which of them are sound under bag-level privacy.

``common.model.build`` maps each method to its model, ``client.objectives`` to its loss. A method declares
here, and nowhere else, that it may be trained privately.
"""

from collections.abc import Mapping
from enum import StrEnum


class Method(StrEnum):
    """Name a training objective together with its pipeline (see ``docs/methods.md``)."""

    LHFGLP = "lhfglp"
    """Dictionary, masks, proportion loss at every level; tied scores and refined labels (docs/methods.md)."""
    DLLP_HIERARCHICAL = "dllp-hierarchical"
    """The plain pipeline (backbone + one linear head a level), proportion loss at every level."""
    DLLP = "dllp"
    """The plain pipeline with a leaf head only, proportion loss at the leaf; coarse levels sum the leaves."""
    LLP_VAT = "llp-vat"
    """As dllp, with virtual adversarial training beside the proportion loss."""
    ROT = "rot"
    """As dllp, with pseudo-labels by optimal transport under each bag's counts beside the proportion loss."""
    LLPFC = "llpfc"
    """As dllp, with the bag's number as a noisy label and forward correction in place of the loss."""
    EASYLLP = "easyllp"
    """As dllp, with an unbiased estimate of each image's loss in place of the proportion loss."""
    MIXBAG = "mixbag"
    """As dllp, with mixtures of two bags matched within a confidence interval."""
    SUPERVISED = "supervised"
    """A bound: as dllp, on bags of one image (labels). For comparisons only."""
    SUPERVISED_HIERARCHICAL = "supervised-hierarchical"
    """A bound: as dllp-hierarchical, on bags of one image (labels). For comparisons only."""

    @property
    def leaf_only(self) -> bool:
        """Return True if the only head is at the leaf and its probabilities are summed up the tree."""
        return self not in (Method.LHFGLP, Method.DLLP_HIERARCHICAL, Method.SUPERVISED_HIERARCHICAL)

    @property
    def sees_labels(self) -> bool:
        """Return True if the method learns from labels, as bags of one image.

        Such a method is a bound for comparisons.
        """
        return self in (Method.SUPERVISED, Method.SUPERVISED_HIERARCHICAL)

    @property
    def why_not_private(self) -> str:
        """Return the reason why the method is not offered under differential privacy, or an empty text.

        Bag-level DP-SGD clips the gradient of one bag at a time. It bounds the influence of a bag only if
        the loss is a mean of terms that depend on one bag each, on no other bag, and on nothing of all the
        site's bags together.
        """
        if self in _ONE_BAG_EACH:
            return ""
        if self.sees_labels:
            return "it learns from labels, as a bound for comparisons"
        # A new method is refused until somebody has shown it sound and listed it.
        return _REASONS.get(self, "nobody has shown that its loss is a mean of terms of one bag each")


_ONE_BAG_EACH = frozenset({Method.LHFGLP, Method.DLLP_HIERARCHICAL, Method.DLLP})
_REASONS: Mapping[Method, str] = {
    Method.LLP_VAT: "its random numbers flow on from bag to bag",
    Method.ROT: "its pseudo-labels have not been examined, although each is made within a bag",
    Method.LLPFC: "its loss of a bag looks at the counts of other bags of the site",
    Method.EASYLLP: "its loss of a bag looks at the counts of the whole site",
    Method.MIXBAG: "its loss mixes two bags",
}
