"""Train one round at a site from bag proportions.

Sees bags and counts, never labels of images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.centring import centre_exactly, centred_in
from client.data.bags import Bags
from client.data.batch import chunks, make_batch
from client.site import TrainingSeeds
from client.terms.base import Objective, Setting, SiteBags
from common.config import RunConfig
from common.config_tables import LARGEST_RATE, Strategy, cosine_decay, run_progress
from common.errors import RunError
from common.model.classifier import HierarchicalClassifier


@dataclass(frozen=True)
class TrainingResult:
    """Summarise one round of local training."""

    loss: float
    """Mean over the round's optimiser steps."""
    steps: int
    bags: int
    images: int


def train_round(
    model: HierarchicalClassifier,
    store: Bags,
    config: RunConfig,
    round: int,
    seeds: TrainingSeeds | None = None,
) -> TrainingResult:
    """Train the model in place for ``train.local-epochs`` passes over the training bags, or for a part.

    Everything random is fixed by the seeds and the round.

    Args:
        model: holds the server's arrays on entry and the site's on return.
        store: the site's bags; the held-back ones are not touched.
        config: the run.
        round: 1-based; sets the objective's weights, the learning rate and the random numbers.
        seeds: the site's; None for those of a simulation.

    Raises:
        RunError: the loss is not finite.
        UserError: the run's method cannot be trained on this site's bags.
    """
    device = choose_device(config.train.device)
    model.to(device).train()
    seeds = seeds or TrainingSeeds(config.seed, store.name)
    _, torch_seed, objective_seed = seeds.of_round(round)
    generator = torch.Generator().manual_seed(torch_seed)
    training, _ = store.split(config.train.held_back, config.seed)
    positions, counts = torch.from_numpy(training), torch.from_numpy(store.leaf_counts[training])
    bags_of_site = SiteBags(positions.to(device), counts.float().to(device))
    objective = Objective(make_setting(store, config, round, bags_of_site))
    drawn = torch.Generator().manual_seed(objective_seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if backbone := centred_in(model, config, round):
        spread = centre_exactly(backbone, store, training)
        return TrainingResult(spread, 1, len(training), int(store.leaf_counts[training].sum()))
    optimiser = build_optimiser(parameters, config, run_progress(round, config.rounds))
    server_values = _server_values(parameters, config)
    losses, images = [], 0
    # Forked, since dropout draws from torch's global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)  # dropout and stochastic depth of the backbone
        for seen in _passes_of_round(training, config, seeds, round):
            for bags in chunks(seen, config.train.bags_per_step):
                batch = make_batch(store, bags).augmented(config.train.augmentation, generator).to(device)
                loss = objective(model, batch, drawn)
                if server_values:
                    loss = loss + _proximal_term(parameters, server_values, config.federation.proximal_mu)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, config.train.clip_gradient)
                optimiser.step()
                # Kept as tensors: reading each as a number would make the GPU wait at every step.
                losses.append(loss.detach())
                images += len(batch.inputs)
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise RunError("local training diverged: the loss is not finite; lower train.learning-rate")
    return TrainingResult(mean_loss, len(losses), len(training), images)


def _passes_of_round(
    training: NDArray[np.int64], config: RunConfig, seeds: TrainingSeeds, round: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the bags that a round trains on, in order, as whole passes or as this round's part of one.

    With ``train.rounds-per-pass`` = k > 1 the k rounds of a pass share one order of the bags and take its k
    parts in turn, so that every bag is seen once in k rounds.
    """
    parts = config.train.rounds_per_pass
    number, part = divmod(round - 1, parts)
    order = np.random.default_rng(seeds.of_round(number + 1)[0])
    for _ in range(config.train.local_epochs):
        bags = order.permutation(training)
        start, end = part * len(bags) // parts, (part + 1) * len(bags) // parts
        # With fewer bags than parts some parts would be empty; these get one bag, so that the site has an
        # update in every round.
        yield bags[start : max(end, start + 1)]


def make_setting(store: Bags, config: RunConfig, round: int, bags: SiteBags | None) -> Setting:
    """Collect what the terms of a round may know.

    Args:
        store: the site's bags.
        config: the run.
        round: 1-based.
        bags: the counts of the whole site, on the device that the run trains on; None in private training.
    """
    return Setting(
        config=config,
        hierarchy=store.hierarchy,
        site=store.name,
        round=round,
        progress=run_progress(round, config.rounds),
        device=choose_device(config.train.device),
        bags=bags,
    )


def build_optimiser(
    parameters: list[nn.Parameter], config: RunConfig, progress: float, start: float | None = None
) -> torch.optim.Optimizer:
    """Build a fresh optimiser at the round's learning rate.

    Its moments are not kept from round to round, since they would be a site's state.

    Args:
        parameters: what is trained.
        config: the run.
        progress: share of the run that is done, in [0, 1].
        start: learning rate at progress 0; None: ``train.learning-rate``, or the largest where that is 0.
    """
    train = config.train
    rate = (start or train.learning_rate or LARGEST_RATE) * cosine_decay(progress)
    if train.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay)


def _proximal_term(parameters: list[nn.Parameter], server_values: list[Tensor], mu: float) -> Tensor:
    """Return mu/2 * ||w - w_server||^2, a scalar (FedProx, Li et al. 2020, eq. 2)."""
    distances = [(p - a).square().sum() for p, a in zip(parameters, server_values, strict=True)]
    return 0.5 * mu * torch.stack(distances).sum()


def _server_values(parameters: list[nn.Parameter], config: RunConfig) -> list[Tensor]:
    if config.federation.strategy != Strategy.FEDPROX:
        return []
    return [parameter.detach().clone() for parameter in parameters]


def choose_device(name: str) -> torch.device:
    """Return the device of this name, with ``auto`` for the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
