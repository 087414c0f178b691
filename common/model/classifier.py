"""Classify images over a label tree: a backbone, then a block and a head for every level, coarse to fine.

    h        = backbone(inputs)                           pooled feature, shape (N, d), and a map
    per level, coarse to fine:
        h    = block(h, sparsemax(scores of the level above)[parent of each class])
        scores = head(h)  (+ the score of the parent, with tied scores)

With the parts of LHFGLP (``common.model.dictionary``, linear heads, tied scores) this is LHFGLP; without
blocks it is the plain pipeline, with the same names for the parameters that both have. This module knows
nothing of losses, files or configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hierarchy import Hierarchy
from common.model.interfaces import Features, Inputs, Output
from common.model.sparsemax import sparsemax


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Choose how the levels of the tree depend on each other."""

    masks: bool = False
    """Tell each block how plausible the parent of each class is. Without blocks the switch has no effect."""
    tied: bool = False
    """One distribution over root-to-leaf paths, p(path) proportional to exp(sum of its nodes' scores), whose
    marginals are the probabilities of every level: the label tree as a hierarchy-and-exclusion graph (Deng et
    al. 2014), whose legal states are here the paths to a leaf. So levels cannot contradict each other, and
    what is learned of a parent moves all its leaves. Without it each level has a softmax of its own."""
    leaf_only: bool = False
    """One head, at the leaf; coarse scores are its probabilities summed up the tree."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Hold the modules that a classifier is built of."""

    backbone: nn.Module
    """See ``common.model.interfaces.Backbone``."""
    heads: Sequence[nn.Module]
    """One per level, or the leaf's alone."""
    blocks: Sequence[nn.Module] = ()
    """One per level, or none."""
    terms: Mapping[str, nn.Module] = field(default_factory=dict)
    """By the loss term that they belong to: trained and sent with the model, not used in prediction."""


class HierarchicalClassifier(nn.Module):
    """Score every class of every level.

    Args:
        hierarchy: the label tree.
        pieces: the modules.
        levels: how the levels depend on each other.

    Raises:
        ValueError: ``leaf_only`` with blocks or with ``tied``; there would be coarse parts without use.
    """

    def __init__(self, hierarchy: Hierarchy, pieces: Pieces, levels: Levels) -> None:
        super().__init__()
        if levels.leaf_only and (pieces.blocks or levels.tied):
            raise ValueError("blocks and tied scores need a head at every level; leaf_only has one")
        self.hierarchy = hierarchy
        self.masks = levels.masks
        self.tied = levels.tied
        self.leaf_only = levels.leaf_only
        self.backbone = pieces.backbone
        self.heads = nn.ModuleList(pieces.heads)
        self.blocks = nn.ModuleList(pieces.blocks)
        self.terms = nn.ModuleDict(pieces.terms)
        # Index tables follow the model to its device, and stay out of its files.
        self.register_buffer("leaf_paths", torch.as_tensor(hierarchy.paths), persistent=False)
        for level, parents in enumerate(hierarchy.parents):
            table = torch.tensor(parents, dtype=torch.int64)
            self.register_buffer(f"parents_{level}", table, persistent=False)

    def forward(self, inputs: Inputs) -> Output:
        """Classify images."""
        features: Features = self.backbone(inputs)
        refined, evidence = features, _Evidence(len(self.heads))
        scores_per_level: list[Tensor] = []
        for level, head in enumerate(self.heads):
            if self.blocks:
                made = self.blocks[level](inputs, refined, self._parents(level, scores_per_level))
                refined = made.features
                evidence.add(level, made.evidence, made.penalties)
            score, seen = head(refined)
            evidence.add(level, seen, {})
            if self.tied and level:
                score = score + scores_per_level[-1][:, self.get_buffer(f"parents_{level}")]
            scores_per_level.append(score)
        summed = self.tied or self.leaf_only
        scores = self._sum_up_the_tree(scores_per_level[-1]) if summed else tuple(scores_per_level)
        return Output(scores, features, evidence.by_level(), evidence.penalties)

    def _parents(self, level: int, scores: Sequence[Tensor]) -> Tensor | None:
        """Return the parent's probability for each class of ``level``, (N, C_l), or None without masks."""
        if not self.masks or level == 0:
            return None
        # A mask only weighs the atoms of a level and must not train the level above, which has its own term
        # in the loss: through it the leaf's larger weight would move the coarse decision.
        probabilities = sparsemax(scores[level - 1].detach())
        return probabilities[:, self.get_buffer(f"parents_{level}")]

    def _sum_up_the_tree(self, leaf_scores: Tensor) -> tuple[Tensor, ...]:
        """Return log-probabilities (N, C_l) per level from leaf scores (N, C_L) by a stable logsumexp."""
        leaf = F.log_softmax(leaf_scores.float(), dim=1)
        scores = []
        for level, size in enumerate(self.hierarchy.sizes[:-1]):
            inside = (
                self.get_buffer("leaf_paths")[:, level] == torch.arange(size, device=leaf.device)[:, None]
            )
            outside = torch.zeros_like(inside, dtype=leaf.dtype).masked_fill(~inside, -torch.inf)
            scores.append((leaf[:, None, :] + outside).logsumexp(dim=2))
        return (*scores, leaf)


class _Evidence:
    """Collect what blocks and heads tell about each level."""

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self._found: dict[str, list[Tensor | None]] = {}
        self.penalties: dict[str, Tensor] = {}

    def add(self, level: int, evidence: Mapping[str, Tensor], penalties: Mapping[str, Tensor]) -> None:
        for name, value in evidence.items():
            self._found.setdefault(name, [None] * self._levels)[level] = value
        for name, value in penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value

    def by_level(self) -> dict[str, tuple[Tensor | None, ...]]:
        return {name: tuple(values) for name, values in self._found.items()}


def log_probabilities(output: Output) -> list[Tensor]:
    """Return the log softmax of the scores per level, float32, shape (N, C_l).

    Scores that are log-probabilities already pass unchanged.
    """
    return [F.log_softmax(scores.float(), dim=1) for scores in output.scores]


def consistent_prediction(output: Output, hierarchy: Hierarchy) -> Tensor:
    """Return the best root-to-leaf path of each image, shape (N, L), int64 (see Hierarchy.decode)."""
    return hierarchy.decode(log_probabilities(output))
