"""What can be learned from bags, by name, and which of it is sound under bag-level privacy.

``common.build`` says what model each method has, ``client.objectives`` what loss. A method declares here,
and nowhere else, whether it may be trained privately: a new one is refused until it is listed as sound.
"""

from collections.abc import Mapping
from enum import StrEnum


class Method(StrEnum):
    """A training objective and its pipeline (see ``docs/methods.md``)."""

    LHFGLP = "lhfglp"
    """All three parts: dictionary, masks, proportion loss at every level."""
    DLLP_HIERARCHICAL = "dllp-hierarchical"
    """The plain pipeline (backbone + one linear head a level), proportion loss at every level."""
    DLLP = "dllp"
    """The plain pipeline, proportion loss at the leaf only; coarse levels sum the leaves."""

    @property
    def why_not_private(self) -> str:
        """Why differential privacy is not offered with this method; empty where it is.

        Bag-level DP-SGD clips the gradient of one bag at a time. It bounds what a bag can do only if the
        loss is a mean of terms that look at one bag each, at no other bag, and at nothing of the whole site.
        """
        if self in _ONE_BAG_EACH:
            return ""
        return _REASONS.get(self, "nobody has shown that its loss is a mean of terms of one bag each")


_ONE_BAG_EACH = frozenset({Method.LHFGLP, Method.DLLP_HIERARCHICAL, Method.DLLP})
_REASONS: Mapping[Method, str] = {}
