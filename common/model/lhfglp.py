"""Define LHFGLP, an image classifier over a label tree with sparse dictionary blocks.

The blocks stand between backbone and heads. The module reads top to bottom: one dictionary block, the
model's output, the model, and the functions that turn its scores into probabilities and predictions. The
parts come from the public description of Learning from Hierarchical Fine-Grained Label Proportions (arXiv
2505.23031); its exact equations are not public, so each equation here names its textbook source. This
module knows nothing of bags, losses, files or configuration.

    h        = backbone(image)                            pooled feature, shape (N, d)
    per level, coarse to fine:
        m    = sparsemax(scores of the level above)[parent of each atom's class], its largest scaled to 1
        z    = T steps of ISTA on  1/2 ||h/|h| - D m z||^2 + lambda ||z||_1
        h    = h + |h| D m z                              z = 0 leaves the feature as it was
        scores = W h + b  (+ the score of the parent, with tied scores)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hierarchy import Hierarchy
from common.model.sparsemax import sparsemax


def soft_threshold(z: Tensor, threshold: Tensor) -> Tensor:
    """Return sign(z) max(|z| - threshold, 0), the proximal map of the l1 norm, threshold >= 0."""
    # Written as z minus z clipped, it is exactly zero inside the threshold, and the backward pass keeps one
    # tensor.
    return z - z.clamp(-threshold, threshold)


def _full(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least.

    Sums need it, because autocast's half precision would round them.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DictionaryBlock(nn.Module):
    """Code the feature sparsely at one level by T unrolled steps of ISTA over a learned dictionary.

    Learned ISTA (Gregor & LeCun 2010) with the weights tied to the dictionary, so that every step stays a
    proximal gradient step (Daubechies, Defrise & De Mol 2004) on the lasso objective of the module docstring.

    The feature is coded at unit length. ISTA is equivariant to a common scale of feature and threshold, so
    this only expresses the thresholds in units of |h|: they keep their meaning whatever scale the backbone
    learns, and the reconstruction error cannot be lowered by shrinking the feature.

    Args:
        n_features: d, length of the feature.
        n_classes: classes of this level.
        atoms_per_class: k; atom j belongs to class j // k.
        iterations: T >= 1.
    """

    def __init__(self, n_features: int, n_classes: int, atoms_per_class: int, iterations: int) -> None:
        super().__init__()
        self.atoms_per_class = atoms_per_class
        self.atoms = nn.Parameter(torch.randn(n_features, n_classes * atoms_per_class))
        with torch.no_grad():
            # ISTA converges for steps up to 1 / ||D||_2^2, the inverse of the gradient's Lipschitz constant.
            step = 0.9 / float(torch.linalg.matrix_norm(self.dictionary(), ord=2)) ** 2
        # A random unit atom meets a unit feature with standard deviation 1 / sqrt(d): a threshold of one
        # such deviation keeps about a third of the atoms in the first step (measured: 15-35 % in the code).
        threshold = step / math.sqrt(n_features)
        self.log_step = nn.Parameter(torch.full((iterations,), math.log(step)))
        self.log_threshold = nn.Parameter(torch.full((iterations,), math.log(threshold)))

    def dictionary(self) -> Tensor:
        """Return D, shape (d, K), the atoms scaled to unit norm."""
        # The norm is taken here and not in the optimiser: it may make the atoms' length anything, and the
        # step size above is valid for unit atoms.
        return F.normalize(self.atoms, dim=0, eps=1e-8)

    def steps(self, unit: Tensor, dictionary: Tensor, weights: Tensor | None) -> list[Tensor]:
        """Return the code after every unrolled step.

        z_{t+1} = soft(z_t - eta_t m D^T (D m z_t - u), tau_t), z_0 = 0. A masked atom (m = 0) gets no
        gradient, and soft(0) = 0, so it is exactly zero at every step. Weights in [0, 1] cannot raise the
        norm of the dictionary, so they keep the step size valid.

        Args:
            unit: u, features at unit length, shape (N, d).
            dictionary: D, unit-norm columns, shape (d, K).
            weights: m, the atoms' weights in [0, 1], shape (N, K), or None for all 1.

        Returns:
            T tensors of shape (N, K).
        """
        eta, tau = self.log_step.exp(), self.log_threshold.exp()
        codes: list[Tensor] = []
        # With z_0 = 0 the first residual is -u; no product is needed for it.
        residual = -unit
        for t in range(eta.numel()):
            gradient = residual @ dictionary
            if weights is not None:
                gradient = gradient * weights
            codes.append(
                soft_threshold(codes[-1] - eta[t] * gradient if codes else -eta[t] * gradient, tau[t])
            )
            if t + 1 < eta.numel():
                weighted = codes[-1] if weights is None else codes[-1] * weights
                residual = weighted @ dictionary.T - unit
        return codes

    def forward(self, feature: Tensor, parent_probabilities: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Code the feature and add its reconstruction.

        Args:
            feature: h, shape (N, d).
            parent_probabilities: for each class of this level its parent's probability, shape (N, C_l),
                or None without masks.

        Returns:
            The refined feature (N, d); the code m z (N, K), the coefficients of the unit-norm atoms in
            units of |h|; the reconstruction error 1/2 ||u - D m z||^2 (N,), at most about 1/2.
        """
        length = feature.norm(dim=1, keepdim=True)
        unit = feature / length.clamp_min(1e-8)
        weights = None
        if parent_probabilities is not None:
            scaled = parent_probabilities / parent_probabilities.amax(dim=1, keepdim=True)
            weights = scaled.repeat_interleave(self.atoms_per_class, dim=1)
        dictionary = self.dictionary()
        code = self.steps(unit, dictionary, weights)[-1]
        if weights is not None:
            code = code * weights
        reconstruction = code @ dictionary.T
        error = 0.5 * _full(unit - reconstruction).square().sum(dim=1)
        return feature + length * reconstruction, code, error


class LHFGLPOutput(NamedTuple):
    """Hold the model's output for N images."""

    scores: tuple[Tensor, ...]
    """Per level (N, C_l): logits; with ``tied`` or ``leaf_only`` log-probabilities, coarse ones summed up the
    tree from the leaves."""
    codes: tuple[Tensor, ...]
    """Per level (N, K_l): the sparse codes; atom j belongs to class j // k. Empty without dictionary."""
    features: Tensor
    """(N, d): the backbone's feature, before any block."""
    reconstruction_error: Tensor
    """(N,): 1/2 ||h - D z||^2 / ||h||^2 summed over levels; zeros without dictionary."""
    code_l1: Tensor
    """(N,): ||z||_1 summed over levels, in units of ||h||; zeros without dictionary."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Choose what an LHFGLP is built of."""

    atoms_per_class: int
    """k, dictionary atoms per class of a level."""
    iterations: int
    """T, unrolled ISTA steps."""
    dictionary: bool
    """Build the dictionary blocks."""
    masks: bool
    """Weight each atom by the plausibility of its class's parent. Masks act on atoms: without a dictionary
    there is nothing to act on, and the switch has no effect."""
    tied: bool
    """One distribution over root-to-leaf paths, p(path) proportional to exp(sum of its nodes' scores), whose
    marginals are the probabilities of every level: the label tree as a hierarchy-and-exclusion graph (Deng et
    al. 2014), whose legal states are here the paths to a leaf. So levels cannot contradict each other, and
    what is learned of a parent moves all its leaves. Without it each level has a softmax of its own."""
    leaf_only: bool
    """One head, at the leaf; coarse scores are its probabilities summed up the tree."""


class LHFGLP(nn.Module):
    """Classify images with a backbone, optional dictionary blocks, and one linear head per level.

    With everything off the blocks do not exist: what is left is the plain pipeline, with the same
    parameter names for the parts that both have.

    Args:
        backbone: maps (N, 3, S, S) to (N, n_features) and has the integer attribute ``n_features``.
        hierarchy: the label tree.
        chosen: what to build.

    Raises:
        ValueError: ``leaf_only`` with a dictionary or with ``tied``; there would be coarse parts without use.
    """

    def __init__(self, backbone: nn.Module, hierarchy: Hierarchy, chosen: Architecture) -> None:
        super().__init__()
        if chosen.leaf_only and (chosen.dictionary or chosen.tied):
            raise ValueError("dictionary and tied scores need a head at every level; leaf_only has one")
        n_features = backbone.n_features
        assert isinstance(n_features, int)
        self.hierarchy = hierarchy
        self.masks = chosen.masks
        self.tied = chosen.tied
        self.leaf_only = chosen.leaf_only
        self.backbone = backbone
        headed = hierarchy.sizes[-1:] if chosen.leaf_only else hierarchy.sizes
        self.heads = nn.ModuleList(nn.Linear(n_features, size) for size in headed)
        # Built last, so that the parts it shares with the plain pipeline draw the same random numbers.
        self.blocks = nn.ModuleList(
            DictionaryBlock(n_features, size, chosen.atoms_per_class, chosen.iterations)
            for size in (hierarchy.sizes if chosen.dictionary else ())
        )
        # Index tables follow the model to its device, and stay out of its files.
        self.register_buffer("leaf_paths", torch.as_tensor(hierarchy.paths), persistent=False)
        for level, parents in enumerate(hierarchy.parents):
            table = torch.tensor(parents, dtype=torch.int64)
            self.register_buffer(f"parents_{level}", table, persistent=False)

    def forward(self, images: Tensor) -> LHFGLPOutput:
        """Classify images.

        Args:
            images: shape (N, 3, S, S), floating, scaled as the model's card says (x / 127.5 - 1).
        """
        features = self.backbone(images)
        if self.leaf_only:
            scores = self._sum_up_the_tree(self.heads[0](features))
            nothing = features.new_zeros(len(features), dtype=torch.float32)
            return LHFGLPOutput(scores, (), features, nothing, nothing)
        refined = features
        scores_per_level: list[Tensor] = []
        codes: list[Tensor] = []
        error = l1 = features.new_zeros(len(features), dtype=torch.float32)
        for level, head in enumerate(self.heads):
            if self.blocks:
                refined, code, level_error = self.blocks[level](
                    refined, self._parents(level, scores_per_level)
                )
                codes.append(code)
                error = error + level_error
                l1 = l1 + _full(code).abs().sum(dim=1)
            score = head(refined)
            if self.tied and level:
                score = score + scores_per_level[-1][:, self.get_buffer(f"parents_{level}")]
            scores_per_level.append(score)
        scores = self._sum_up_the_tree(scores_per_level[-1]) if self.tied else tuple(scores_per_level)
        return LHFGLPOutput(scores, tuple(codes), features, error, l1)

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


def log_probabilities(output: LHFGLPOutput) -> list[Tensor]:
    """Return the log softmax of the scores per level, float32, shape (N, C_l).

    Scores that are log-probabilities already pass unchanged.
    """
    return [F.log_softmax(scores.float(), dim=1) for scores in output.scores]


def consistent_prediction(output: LHFGLPOutput, hierarchy: Hierarchy) -> Tensor:
    """Return the best root-to-leaf path of each image, shape (N, L), int64 (see Hierarchy.decode)."""
    return hierarchy.decode(log_probabilities(output))
