"""Train on pseudo-labels that keep each bag's counts, beside proportion matching (ROT).

The pseudo-labels come from entropic optimal transport.

Optimal transport between a bag's images and its counts as a loss is due to Dulac-Arnold et al. 2019, "Deep
multi-class learning from label proportions" (ROT); training on the plan as pseudo-labels to Liu et al. 2021,
"Two-stage training for learning from label proportions". For a bag of m images with counts n, and Q the plan
of ``transport``, a constant:

    loss = KL(n / m || mean_i p_i) - w / m sum_ic Q_ic log p_ic, averaged over bags

Departures: the counts are exact, so the marginal of the classes is kept and not relaxed as in ROT. Of the two
stages only the losses are kept: both terms act from the start and Q is made anew in every step. Plain
cross-entropy takes the place of Liu et al.'s symmetric one, and there is no mixup.
"""

from pydantic import Field
from torch import Tensor

from client.terms.base import Setting, Step
from common.model.losses import bag_means
from common.parts import Kind, Part
from common.settings_file import Section


class ROTSettings(Section):
    """Hold the weight and the sharpness of the pseudo-labels."""

    weight: float = Field(1.0, ge=0, le=100, description="weight of the pseudo-labels")
    temperature: float = Field(
        1.0, ge=0.05, le=100, description="entropy of the pseudo-labels; small is hard"
    )


class TransportedLabels:
    """Compute the cross-entropy against transported pseudo-labels, times its weight."""

    def __init__(self, setting: Setting, settings: ROTSettings) -> None:
        self.settings = settings

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        labels = step.soft_labels(self.settings.temperature)
        per_image = -(labels * step.log_probabilities[-1]).sum(dim=1)
        return self.settings.weight * bag_means(per_image, step.inputs.bag_index, len(step.batch))


PART = Part(
    Kind.TERM,
    "rot",
    TransportedLabels,
    "ROT, Dulac-Arnold et al. 2019; Liu et al. 2021; our own code, Apache-2.0",
    ROTSettings,
)
