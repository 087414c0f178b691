"""One round of local training from bag proportions. Sees bags and counts, never labels of images."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.augment import augment_bag
from client.bags import BagStore, to_tensor
from common.config import Method, RunConfig, Strategy
from common.errors import RunError
from common.lhfglp import LHFGLP
from common.losses import hierarchical_proportion_loss, level_weights

FLOOR = 0.05
"""The learning rate falls along half a cosine to this share of its start."""


@dataclass(frozen=True)
class Batch:
    """Several bags as one tensor."""

    images: Tensor
    """Shape (N, 3, S, S) in [-1, 1]; the images of a bag are consecutive."""
    bag_index: Tensor
    """Shape (N,) int64: the bag of each image, 0..B-1."""
    level_counts: list[Tensor]
    """Per level shape (B, C_l), float32."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        counts = [count.to(device) for count in self.level_counts]
        return Batch(self.images.to(device), self.bag_index.to(device), counts)


@dataclass(frozen=True)
class TrainingResult:
    """What one round of local training did."""

    loss: float
    """Mean over the round's optimiser steps."""
    steps: int
    bags: int
    images: int


def train_round(model: LHFGLP, store: BagStore, config: RunConfig, round: int) -> TrainingResult:
    """Train the model in place for ``train.local-epochs`` passes over the site's training bags.

    Everything random is fixed by (run seed, site name, round), so a round can be repeated anywhere.

    Args:
        model: holds the server's arrays on entry and the site's on return.
        store: the site's bags; the held-back ones are not touched.
        config: the run.
        round: 1-based; sets the level weights, the learning rate and the random numbers.

    Raises:
        RunError: the loss is not finite.
    """
    device = choose_device(config.train.device)
    model.to(device).train()
    seeds = seed_sequence(config.seed, store.name, round)
    order, torch_seed = np.random.default_rng(seeds[0]), seeds[1]
    generator = torch.Generator().manual_seed(torch_seed)
    training, _ = store.split(config.train.held_back, config.seed)
    progress = (round - 1) / max(config.rounds - 1, 1)
    weights = level_weights(
        config.loss, len(store.hierarchy.levels), progress, config.model.method is Method.DLLP
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = build_optimiser(parameters, config, progress)
    anchors = _anchors(parameters, config)
    losses, images = [], 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)  # dropout and stochastic depth of the backbone
        for _ in range(config.train.local_epochs):
            for bags in chunks(order.permutation(training), config.train.bags_per_step):
                batch = make_batch(store, bags, generator if config.train.augment else None).to(device)
                loss = batch_loss(model, batch, config, weights)
                if anchors:
                    loss = loss + proximal_term(parameters, anchors, config.federation.proximal_mu)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, config.train.clip_gradient)
                optimiser.step()
                losses.append(loss.detach())
                images += len(batch.images)
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise RunError("local training diverged: the loss is not finite; lower train.learning-rate")
    return TrainingResult(mean_loss, len(losses), len(training), images)


def make_batch(store: BagStore, bags: NDArray[np.int64], generator: torch.Generator | None) -> Batch:
    """Bags as one batch, augmented bag by bag when a generator is given."""
    chosen = [store[int(bag)] for bag in bags]
    tensors = [to_tensor(bag.images) for bag in chosen]
    if generator is not None:
        tensors = [augment_bag(images, generator) for images in tensors]
    counts = store.hierarchy.roll_up(np.stack([bag.counts for bag in chosen]))
    sizes = torch.tensor([len(images) for images in tensors])
    return Batch(
        torch.cat(tensors),
        torch.repeat_interleave(torch.arange(len(chosen)), sizes),
        [torch.from_numpy(level).float() for level in counts],
    )


def batch_loss(model: LHFGLP, batch: Batch, config: RunConfig, weights: Sequence[float]) -> Tensor:
    """The hierarchical proportion loss of a batch, a scalar; ``weights`` are of the levels."""
    return hierarchical_proportion_loss(
        model(batch.images),
        batch.bag_index,
        batch.level_counts,
        weights,
        config.loss.reconstruction,
        config.loss.sparsity,
    )


def build_optimiser(
    parameters: list[nn.Parameter], config: RunConfig, progress: float
) -> torch.optim.Optimizer:
    """A fresh optimiser (its moments would be a site's state) at the round's learning rate."""
    train = config.train
    rate = train.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
    if train.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay)


def proximal_term(parameters: list[nn.Parameter], anchors: list[Tensor], mu: float) -> Tensor:
    """mu/2 * ||w - w_server||^2 (FedProx; Li et al. 2020, eq. 2)."""
    distances = [(p - a).square().sum() for p, a in zip(parameters, anchors, strict=True)]
    return 0.5 * mu * torch.stack(distances).sum()


def _anchors(parameters: list[nn.Parameter], config: RunConfig) -> list[Tensor]:
    if config.federation.strategy is not Strategy.FEDPROX:
        return []
    return [parameter.detach().clone() for parameter in parameters]


def chunks(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Consecutive pieces of at most ``size`` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def seed_sequence(seed: int, site: str, round: int) -> tuple[int, int]:
    """Two seeds for one site and round: for the order of the bags, and for torch."""
    state = np.random.SeedSequence([seed, zlib.crc32(site.encode()), round]).generate_state(2)
    return int(state[0]), int(state[1])


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
