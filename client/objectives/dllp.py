"""Match the proportions of each bag, at the leaf or at every level.

Ardehaly & Culotta 2017, "Co-training for demographic classification using deep learning from label
proportions", eq. 2: the divergence between a bag's known proportions and the mean of its images' predicted
probabilities. Here it is a KL divergence, which differs from their cross-entropy by a constant. The mean is
over bags, whatever their sizes; each term depends on one bag.
"""

from torch import Tensor

from client.data.batch import Batch
from client.objectives.base import Setting
from common.model.lhfglp import LHFGLP
from common.model.losses import level_weights, proportion_kl


class LeafProportions:
    """Compute the KL divergence at the leaf, averaged over bags."""

    def __init__(self, setting: Setting) -> None:
        pass

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss of a batch, as ``Objective`` describes."""
        scores = model(batch.images).scores[-1]
        return proportion_kl(scores, batch.bag_index, batch.level_counts[-1]).mean()


class LevelProportions:
    """Compute sum_l w_l KL_l over the levels, averaged over bags, with the weights of ``LossConfig``."""

    def __init__(self, setting: Setting) -> None:
        self.weights = level_weights(setting.config.loss, len(setting.hierarchy.levels), setting.progress)

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss of a batch, as ``Objective`` describes."""
        per_bag = batch.level_counts[0].new_zeros(len(batch))
        levels = zip(model(batch.images).scores, batch.level_counts, self.weights, strict=True)
        for scores, counts, weight in levels:
            if weight:
                per_bag = per_bag + weight * proportion_kl(scores, batch.bag_index, counts)
        return per_bag.mean()
