"""Compute LHFGLP's loss of matched proportions, refined labels and the price of the sparse codes.

    (1 - mu) sum_l w_l KL(q_l || p_l)  -  mu sum_l w_l mean_i sum_c Q_ilc log p_ilc
        +  alpha * reconstruction  +  beta * ||z||_1,  averaged over bags

The first and the last two terms come from the public description of LHFGLP (Chang et al. 2025, arXiv
2505.23031), whose exact equations are not public; ``common.model.losses`` names the source of each. The
second is ours. Matching does not tell which image of a bag is which; the refined labels Q do: the model's
own leaf probabilities, sharpened and scaled until they add up to the bag's counts (``transport``), and summed
up the tree. They are constants in the gradient, so this alternates between labels and parameters as
expectation maximisation does.

Every term depends on one bag, which is what bag-level privacy needs.
"""

import torch
from torch import Tensor

from client.data.batch import Batch
from client.objectives.base import Setting
from client.objectives.transport import pseudo_labels
from common.model.lhfglp import LHFGLP, log_probabilities
from common.model.losses import hierarchical_proportion_loss, level_weights, refined_label_loss


class HierarchicalProportions:
    """Compute the loss at the round's level weights.

    The weight mu of the refined labels is ``loss.refinement``.
    """

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config.loss
        self.weights = level_weights(self.config, len(setting.hierarchy.levels), setting.progress)
        self.leaf_paths = torch.as_tensor(setting.hierarchy.paths, device=setting.bags.device)

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss of a batch, as ``Objective`` describes."""
        output = model(batch.images)
        loss = hierarchical_proportion_loss(
            output,
            batch.bag_index,
            batch.level_counts,
            [(1 - self.config.refinement) * weight for weight in self.weights],
            (self.config.reconstruction, self.config.sparsity),
        )
        if not self.config.refinement:
            return loss
        predicted = log_probabilities(output)
        with torch.no_grad():
            labels = pseudo_labels(
                predicted[-1], batch.bag_index, batch.level_counts[-1], self.config.temperature
            )
        refined = refined_label_loss(predicted, batch.bag_index, labels, self.leaf_paths, self.weights)
        return loss + self.config.refinement * refined.mean()
