"""Clip the gradients of many bags at once, where only linear heads on fixed features are trained.

The gradient of a linear layer is an outer product of its inputs and of the gradients of its outputs, so each
bag's norm follows from two small Gram matrices and no gradient of a single bag is ever formed ("ghost norm",
Goodfellow 2015; Li et al. 2022). A bag's loss depends on no other bag, which is checked before
(``client.private_check``), so one backward pass gives every bag's output gradients exactly.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.bags import Bags
from client.data.batch import Batch, make_batch
from client.terms.base import Objective
from common.model.classifier import HierarchicalClassifier
from common.model.features.frozen import FrozenFeatures
from common.model.heads import LinearHead

_WITHOUT_CHANCE = frozenset({"matching", "refined", "codes"})
"""Terms that draw nothing at random: a bag's own seed makes no difference to them."""
_IMAGES_AT_ONCE = 4096


@dataclass
class ClippedSum:
    """Hold the sum of the clipped gradients of some bags."""

    gradients: dict[Tensor, Tensor]
    """By parameter, float64."""
    discarded: int = 0
    """Bags whose gradient was not finite; they count as zero."""


def suits(model: HierarchicalClassifier, terms: Iterable[str]) -> bool:
    """Return True if all that is trained are linear heads on fixed features, by terms without chance."""
    return (
        isinstance(model.backbone, FrozenFeatures)
        and not model.blocks
        and not model.terms
        and all(type(head) is LinearHead for head in model.heads)
        and _WITHOUT_CHANCE.issuperset(terms)
    )


def clipped_sum(
    model: HierarchicalClassifier, objective: Objective, batches: Iterable[Batch], clip_norm: float
) -> ClippedSum:
    """Return the sum over bags of their gradients, each scaled by min(1, C / norm) as one vector.

    Args:
        model: one that ``suits``, on its device.
        objective: of the round.
        batches: the bags, see ``pieces``; maybe none.
        clip_norm: C.
    """
    heads = [head for head in model.heads if isinstance(head, LinearHead)]
    total = ClippedSum({})
    for head in heads:
        for parameter in (head.weight, head.bias):
            total.gradients[parameter] = torch.zeros_like(parameter, dtype=torch.float64)
    for batch in batches:
        inputs, outputs = _at_the_heads(model, objective, batch.to(heads[0].weight.device))
        index = batch.inputs.bag_index.to(inputs.device)
        norms = _norms(inputs, outputs, torch.bincount(index, minlength=len(batch)))
        finite = torch.isfinite(norms)
        total.discarded += int((~finite).sum())
        factors = (clip_norm / norms).clamp(max=1.0)[index, None]
        # A gradient that is not finite counts as zero, which is within the clip norm.
        weighted = torch.where(finite[index, None], factors * outputs, 0.0)
        inputs = torch.where(finite[index, None], inputs, 0.0)
        for head, own in zip(heads, torch.split(weighted, [h.out_features for h in heads], 1), strict=True):
            total.gradients[head.weight] += own.T @ inputs
            total.gradients[head.bias] += own.sum(dim=0)
    return total


def pieces(store: Bags, bags: NDArray[np.int64]) -> Iterator[Batch]:
    """Yield the bags, given by their positions, in batches of about as many images as may be in memory."""
    place = np.cumsum(store.leaf_counts[bags].sum(axis=1)) // _IMAGES_AT_ONCE
    for piece in np.unique(place):
        yield make_batch(store, bags[place == piece])


def _at_the_heads(model: HierarchicalClassifier, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the heads' inputs (N, d) and the loss's gradients to their outputs (N, sum C_l), float64."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        found.append(output[0])

    handles = [head.register_forward_hook(keep) for head in model.heads]
    try:
        losses = objective.of_bags(model, batch, torch.Generator())
    finally:
        for handle in handles:
            handle.remove()
    outputs = torch.cat(torch.autograd.grad(losses.sum(), found), dim=1)
    with torch.no_grad():
        inputs: Tensor = model.backbone(batch.inputs).pooled
    return inputs.double(), outputs.double()


def _norms(inputs: Tensor, outputs: Tensor, sizes: Tensor) -> Tensor:
    """Return the norm of each bag's gradient, shape (B,), float64.

    In float32 a norm could come out too small, and the bag would exceed its bound by as much.
    """
    squares = inputs.new_empty(len(sizes))
    starts = sizes.cumsum(0) - sizes
    for size in sorted(set(sizes.tolist())):
        which = (sizes == size).nonzero().flatten()
        rows = starts[which, None] + torch.arange(size, device=inputs.device)
        x, g = inputs[rows], outputs[rows]
        # The 1 is the bias, the weight of a feature that is always 1.
        products = (x @ x.transpose(1, 2) + 1) * (g @ g.transpose(1, 2))
        squares[which] = products.sum(dim=(1, 2)).clamp_min(0)
    return squares.sqrt()
