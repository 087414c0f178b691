"""Define a training objective as a loss for a batch of bags, and the facts that it may use.

An objective is made once per round and sees bags with counts, never a label of an image. It neither opens
files nor steps the optimiser.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from client.data.batch import Batch
from common.config import RunConfig
from common.hierarchy import Hierarchy
from common.model.lhfglp import LHFGLP


@dataclass(frozen=True)
class Setting:
    """Hold what an objective may know of the run, the site and the round."""

    config: RunConfig
    hierarchy: Hierarchy
    site: str
    """The site's name; with the run's seed and a round it names random numbers that outlive a round."""
    round: int
    """1-based."""
    progress: float
    """Share of the run that is done at the round's start, in [0, 1]."""
    bags: Tensor
    """Shape (B,) int64: the positions in the store of the site's training bags, ascending. Empty under
    differential privacy, where nothing of the whole site may be looked at."""
    leaf_counts: Tensor
    """Shape (B, C_L) float32: their counts; a row sums to the images of its bag. Empty as ``bags``."""
    generator: torch.Generator
    """On the CPU. Everything random in an objective comes from here, or from torch's global generator, which
    the loop seeds (dropout)."""


class Objective(Protocol):
    """Compute the loss of a batch, which training minimises."""

    def __call__(self, model: LHFGLP, batch: Batch) -> Tensor:
        """Return the loss, a scalar with a graph to the model's parameters.

        Args:
            model: in training mode, on the batch's device.
            batch: at least one bag; sizes may differ.
        """
        ...
