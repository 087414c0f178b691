"""Combine proportion matching with pseudo-labels that keep each bag's counts (ROT).

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

import torch.nn.functional as F
from torch import Tensor

from client.data.batch import Batch
from client.objectives.base import Setting
from client.objectives.transport import pseudo_labels
from common.model.lhfglp import LHFGLP
from common.model.losses import bag_means, proportion_kl


class TransportedLabels:
    """Add the cross-entropy against transported pseudo-labels to the leaf proportion loss."""

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config.objective

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss of a batch, as ``Objective`` describes."""
        scores, counts = model(batch.images).scores[-1], batch.level_counts[-1]
        predicted = F.log_softmax(scores.float(), dim=1)
        labels = pseudo_labels(predicted.detach(), batch.bag_index, counts, self.config.rot_temperature)
        cross_entropy = bag_means(-(labels * predicted).sum(dim=1), batch.bag_index, len(batch))
        matching = proportion_kl(scores, batch.bag_index, counts)
        return (matching + self.config.rot_weight * cross_entropy).mean()
