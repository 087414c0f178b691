"""LHFGLP's objective: proportion matching at every level, and the price of the sparse codes.

    sum_l w_l KL(q_l || p_l) + alpha * reconstruction + beta * ||z||_1, averaged over bags

The parts come from the public description of LHFGLP (Chang et al. 2025, arXiv 2505.23031), whose exact
equations are not public; ``common.losses`` names the source of each. Each term looks at one bag.
"""

from torch import Tensor

from client.batch import Batch
from client.objectives.base import Setting
from common.lhfglp import LHFGLP
from common.losses import hierarchical_proportion_loss, level_weights


class HierarchicalProportions:
    """The hierarchical proportion loss at the round's level weights."""

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config.loss
        self.weights = level_weights(self.config, len(setting.hierarchy.levels), setting.progress)

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """See ``Objective``."""
        return hierarchical_proportion_loss(
            model(batch.images),
            batch.bag_index,
            batch.level_counts,
            self.weights,
            self.config.reconstruction,
            self.config.sparsity,
        )
