"""Match the proportions of each bag, refine labels under its counts, and charge for the sparse codes.

    (1 - mu) sum_l w_l KL(q_l || p_l)  -  mu sum_l w_l mean_i sum_c Q_ilc log p_ilc
        +  alpha * reconstruction  +  beta * ||z||_1

are the terms ``matching``, ``refined`` and ``codes`` of LHFGLP. The first and the last come from its public
description (Chang et al. 2025, arXiv 2505.23031), whose exact equations are not public;
``common.model.losses`` names the source of each. ``refined`` is ours: matching does not tell which image of a
bag is which. The refined labels Q do: the model's own leaf probabilities, sharpened and scaled until they add
up to the bag's counts (``transport``), and summed up the tree. They are constants in the gradient, so this
alternates between labels and parameters as expectation maximisation does.

``matching`` alone is DLLP (Ardehaly & Culotta 2017, eq. 2), at the leaf or at every level, up to a constant.
"""

import torch
from torch import Tensor

from client.terms.base import Setting, Step
from common.model.losses import bag_means, level_divergence, level_weights, refined_label_loss
from common.parts import Kind, NoSettings, Part

_REFINED = "refined"


class Matching:
    """Compute sum_l w_l KL(q_l || p_l) over the levels that have a head.

    Beside the term ``refined`` it weighs 1 - ``loss.refinement``, else 1.
    """

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        self.weights = _level_weights(setting)
        recipe, loss = setting.config.model.recipe, setting.config.loss
        if _REFINED in recipe.terms:
            self.weights = [(1 - loss.refinement) * weight for weight in self.weights]

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        return level_divergence(
            step.output.scores, step.inputs.bag_index, step.batch.level_counts, self.weights
        )


class Codes:
    """Compute the price of a block's sparse codes, as a mean over a bag's images; 0 without such a block."""

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        self.loss = setting.config.loss

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        penalties = step.output.penalties
        if "codes" not in penalties:
            return torch.zeros(len(step.batch), device=step.inputs.bag_index.device)
        price = (
            self.loss.reconstruction * penalties["reconstruction"] + self.loss.sparsity * penalties["codes"]
        )
        return bag_means(price, step.inputs.bag_index, len(step.batch))


class Refined:
    """Compute the cross-entropy against refined labels, times ``loss.refinement``."""

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        self.loss = setting.config.loss
        self.weights = _level_weights(setting)
        self.leaf_paths = torch.as_tensor(setting.hierarchy.paths, device=setting.device)

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        if not self.loss.refinement:
            return torch.zeros(len(step.batch), device=step.inputs.bag_index.device)
        refined = refined_label_loss(
            step.log_probabilities,
            step.inputs.bag_index,
            step.soft_labels(self.loss.temperature),
            self.leaf_paths,
            self.weights,
        )
        return self.loss.refinement * refined


def _level_weights(setting: Setting) -> list[float]:
    levels = len(setting.hierarchy.levels)
    if setting.config.model.recipe.leaf_only:
        return [0.0] * (levels - 1) + [1.0]
    return list(level_weights(setting.config.loss, levels, setting.progress))


_LHFGLP = "LHFGLP, Chang et al. 2025, arXiv 2505.23031; our own code, Apache-2.0"
MATCHING = Part(Kind.TERM, "matching", Matching, "Ardehaly & Culotta 2017, eq. 2; our own code, Apache-2.0")
CODES = Part(Kind.TERM, "codes", Codes, _LHFGLP)
REFINED = Part(Kind.TERM, _REFINED, Refined, "our own, Apache-2.0")
