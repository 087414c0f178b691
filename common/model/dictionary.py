"""Code features sparsely over a learned dictionary, level by level: the block of LHFGLP.

The parts come from the public description of Learning from Hierarchical Fine-Grained Label Proportions (arXiv
2505.23031); its exact equations are not public, so each equation here names its textbook source. Per level:

    m    = probabilities of the atoms' parent classes, the largest scaled to 1
    z    = T steps of ISTA on  1/2 ||h/|h| - D m z||^2 + lambda ||z||_1
    h    = h + |h| D m z                              z = 0 leaves the feature as it was
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.interfaces import Features, Inputs, Level, Refined
from common.parts import Kind, NoSettings, Part


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

    def forward(self, inputs: Inputs, features: Features, parents: Tensor | None) -> Refined:
        """Code the pooled feature and add its reconstruction.

        Args:
            inputs: not looked at.
            features: their pooled part is h, shape (N, d); their map passes unchanged.
            parents: for each class of this level its parent's probability, shape (N, C_l), or None.

        Returns:
            Evidence ``codes``: m z, shape (N, K), the coefficients of the unit-norm atoms in units of |h|;
            atom j belongs to class j // k. Penalties ``reconstruction``: 1/2 ||u - D m z||^2, at most about
            1/2, and ``codes``: ||z||_1 in units of |h|.
        """
        feature = features.pooled
        length = feature.norm(dim=1, keepdim=True)
        unit = feature / length.clamp_min(1e-8)
        weights = None
        if parents is not None:
            scaled = parents / parents.amax(dim=1, keepdim=True)
            weights = scaled.repeat_interleave(self.atoms_per_class, dim=1)
        dictionary = self.dictionary()
        code = self.steps(unit, dictionary, weights)[-1]
        if weights is not None:
            code = code * weights
        reconstruction = code @ dictionary.T
        return Refined(
            features._replace(pooled=feature + length * reconstruction),
            {"codes": code},
            {
                "reconstruction": 0.5 * _full(unit - reconstruction).square().sum(dim=1),
                "codes": _full(code).abs().sum(dim=1),
            },
        )


def _build(level: Level, settings: NoSettings) -> DictionaryBlock:
    config = level.config
    return DictionaryBlock(level.n_features, level.n_classes, config.atoms_per_class, config.iterations)


PART = Part(
    Kind.BLOCK,
    "dictionary",
    _build,
    "LHFGLP, Chang et al. 2025, arXiv 2505.23031; our own code, Apache-2.0",
)
