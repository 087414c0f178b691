"""Use a bag's number as the noisy label of its images, in a forward-corrected cross-entropy (LLPFC).

Zhang, Wang & Scott 2022, "Learning from label proportions by learning with label noise" (arXiv 2203.02496),
the variant with uniform noisy priors (LLPFC-uniform). Bags are put into groups. Within a group of G bags with
proportions gamma (G, C), an image drawn from a random bag has noisy label i, its bag, and unknown class j:

    P(i | j) = T_ij = gamma_ij a_i / pi_j,   a_i = 1 / G,   pi = gamma^T a
    loss = -log (T p(x))_i, averaged over a bag's images, then over bags

(forward correction, Patrini et al. 2017). Every ``parts.llpfc.regroup`` passes the groups are made anew,
and of TRIES random partitions the one whose matrices gamma are conditioned best is taken: classes are only
told apart along directions in which the bags of a group differ.

Departures: the paper takes one random partition. A group holds at least ``parts.llpfc.group`` bags
(default: as many as leaves, as in the paper) and takes in those that are left over, so T may have more rows
than columns and no bag idles; a site with fewer bags than leaves has one group, whose T cannot tell all
leaves apart. A class that no bag of a group holds has a column of zeros: it explains none of its images.
"""

import zlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from client.terms.base import Setting, Step
from common.model.losses import SMALLEST_PREDICTED, bag_means
from common.parts import Kind, Part
from common.settings_file import Section

TRIES = 10
"""Random partitions of which the best-conditioned is taken."""


class LLPFCSettings(Section):
    """Hold how bags are put into groups."""

    group: int = Field(0, ge=0, le=100_000, description="fewest bags of a group; 0: as many as leaves")
    regroup: int = Field(20, ge=1, le=100_000, description="passes over the bags between new groups")


class ForwardCorrection:
    """Compute forward-corrected cross-entropy against the bags' numbers, under the groups of the round."""

    def __init__(self, setting: Setting, settings: LLPFCSettings) -> None:
        config = setting.config
        passed = (setting.round - 1) * config.train.local_epochs // config.train.rounds_per_pass
        # Groups outlive the round's generator: they are named by the pass, from 1, in which they were made.
        since = passed // settings.regroup * settings.regroup + 1
        rng = np.random.default_rng([config.seed, zlib.crc32(setting.site.encode()), since])
        counts = setting.whole_site.leaf_counts.double().cpu().numpy()
        proportions = counts / counts.sum(axis=1, keepdims=True)
        size = settings.group or counts.shape[1]
        rows = np.zeros_like(proportions)
        groups = make_groups(proportions, size, rng)
        self.group_of = np.zeros(len(proportions), dtype=np.int64)
        for number, group in enumerate(groups):
            self.group_of[group] = number
            rows[group] = transition_matrix(proportions[group])
        self.bags = setting.whole_site.positions
        self.rows = torch.from_numpy(rows).float().to(setting.device)
        """Shape (B, C_L): the row of T that belongs to each training bag."""

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,)."""
        bag_index = step.inputs.bag_index
        rows = self.rows[torch.searchsorted(self.bags, step.batch.bags)][bag_index]
        predicted = F.softmax(step.output.scores[-1].float(), dim=1)
        likelihood = (rows * predicted).sum(dim=1).clamp_min(SMALLEST_PREDICTED)
        return bag_means(-likelihood.log(), bag_index, len(step.batch))


def transition_matrix(proportions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return T of one group, P(bag | class) for an image of a uniformly drawn bag.

    Args:
        proportions: gamma, shape (G, C), rows sum to 1.

    Returns:
        Shape (G, C). A column sums to 1, or to 0 for a class that no bag holds.
    """
    total = proportions.sum(axis=0)
    rows: NDArray[np.float64] = proportions / np.where(total > 0, total, 1.0)
    return rows


def make_groups(
    proportions: NDArray[np.float64], size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Divide bags into well-conditioned groups of at least ``size``, or into one where there are fewer.

    Args:
        proportions: shape (B, C).
        size: bags per group, at least.
        rng: draws TRIES partitions.

    Returns:
        Disjoint groups of bag numbers that together hold all bags: of the partitions drawn, the one with the
        largest smallest singular value of gamma, on average over groups.
    """
    number = max(1, len(proportions) // size)
    tries = [np.array_split(rng.permutation(len(proportions)), number) for _ in range(TRIES)]
    return max(tries, key=lambda groups: sum(_conditioning(proportions[group]) for group in groups))


def _conditioning(proportions: NDArray[np.float64]) -> float:
    return float(np.linalg.svd(proportions, compute_uv=False)[-1])


PART = Part(
    Kind.TERM,
    "llpfc",
    ForwardCorrection,
    "LLPFC, Zhang, Wang & Scott 2022, arXiv 2203.02496; our own code, Apache-2.0",
    LLPFCSettings,
)
