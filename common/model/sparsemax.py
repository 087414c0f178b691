"""Project scores onto the probability simplex by sparsemax, a softmax with exact zeros.

Martins & Astudillo 2016, "From Softmax to Sparsemax" (arXiv 1602.02068). This module knows nothing of
classes, levels or bags. Plain tensor operations, so torch.func, vmap and per-example gradient hooks see
through it.
"""

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row of ``scores`` onto the simplex, along the last dimension.

    Algorithm 1 of the paper finds the support S without a gradient; on it p_i = z_i - tau with
    tau = (sum_S z - 1) / |S|. Differentiating that expression with S held fixed is the exact Jacobian,
    diag(s) - s s^T / |S| (equation 11), s being the indicator of S. Where the support is about to
    change the map has a kink, and this is one of its generalised Jacobians.

    Args:
        scores: shape (..., C), C >= 1, any floating dtype.

    Returns:
        The same shape; non-negative rows that sum to 1. Computed in float32 at least, and returned so:
        float16 and bfloat16 inputs give float32, whose rows sum to 1 and float16's would not.
    """
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The projection does not change when a constant is added to a row; without its offset nothing cancels.
    z = z - z.detach().amax(dim=-1, keepdim=True)
    with torch.no_grad():
        descending = z.sort(dim=-1, descending=True).values
        rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        kept = 1 + rank * descending > descending.cumsum(dim=-1)
        # A row with NaN keeps nothing; it gives NaN, as softmax does, rather than an error that would tell
        # of it (in private training a gradient that is not finite counts as zero).
        size = kept.sum(dim=-1, keepdim=True).clamp_min(1)
        # Ties share one value, so they are inside the support together or outside it together.
        support = z >= descending.gather(-1, size - 1)
    inside = support.to(z.dtype)
    # The top score is always kept, so no support is empty.
    tau = ((inside * z).sum(dim=-1, keepdim=True) - 1) / inside.sum(dim=-1, keepdim=True)
    projected = torch.where(support, z - tau, torch.zeros_like(z)).clamp(min=0)
    return torch.where(z.isnan().any(dim=-1, keepdim=True), torch.full_like(z, torch.nan), projected)
