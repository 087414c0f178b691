"""Train one round at a site under bag-level differential privacy.

This is the private counterpart of ``client.training``. Bag-level DP-SGD (Abadi et al. 2016, with a bag as the
example): the gradient of each drawn bag is clipped on its own, noise is added to the sum, and the sum is
divided by the expected number of bags. What is random about privacy, and what it costs, comes from one
PrivacyPlan. Nothing but the model leaves: losses, the bags that were drawn and the gradients that were not
finite stay here.

One backward pass per bag is exact for every layer and loss, takes bags of any size, and needs the memory of
one bag. The regularisers are part of a bag's loss, so they are clipped with it; weight decay and FedProx's
pull do not depend on data and act after the noise.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from client.centring import centred_in, centring_loss
from client.data.bags import Bags
from client.data.batch import Batch, make_batch
from client.ghost_clipping import ClippedSum, clipped_sum, pieces, suits
from client.private_check import Unchanged, refuse_unsound
from client.site import TrainingSeeds
from client.terms.base import Objective, Setting
from client.training import (
    TrainingResult,
    build_optimiser,
    choose_device,
    make_setting,
)
from common.config import RunConfig
from common.config_tables import Strategy, rate_by_noise, run_progress
from common.errors import ConfigError, RunError
from common.model.classifier import HierarchicalClassifier
from common.model.features.frozen import FrozenFeatures
from common.privacy.plan import PrivacyPlan

log = logging.getLogger("fedbags.client")

_PIECE = 4096
"""Most numbers whose squares are added up in float32."""
_WITHHELD = math.nan
"""Stands for a mean loss, which is computed from private data and is not covered by the plan."""


class BagDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Clip and add noise as Opacus's DPOptimizer does, fed with one bag at a time.

    Call ``add_bag`` for each bag that was drawn, maybe for none, then ``step``. The parameters that the
    wrapped optimiser holds see only ``(sum of clipped gradients + noise) / expected bags``. Adding or
    removing one bag moves the sum by at most ``plan.clip_norm``, replacing one by at most twice that.

    Attributes:
        steps: optimiser steps taken, those without a bag included.
        discarded: bags whose gradient was not finite. Depends on private data and must not leave.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, plan: PrivacyPlan, round: int) -> None:
        super().__init__(
            optimiser,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip_norm,
            expected_batch_size=plan.expected_bags,
        )
        self._plan, self._round = plan, round
        self.steps = 0
        self.discarded = 0

    def add_bag(self, loss: Tensor) -> None:
        """Differentiate the loss of ONE bag and add its clipped gradient to the sum.

        Args:
            loss: a scalar whose graph holds no other bag.
        """
        self.original_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.clip_and_accumulate()

    def add_sum(self, found: ClippedSum) -> None:
        """Add the clipped gradients of several bags, computed together, to the sum."""
        self.discarded += found.discarded
        for parameter in self.params:
            gradient = found.gradients[parameter].to(parameter.dtype)
            total = parameter.summed_grad
            parameter.summed_grad = gradient if total is None else total + gradient

    def clip_and_accumulate(self) -> None:
        """Move the present gradients into the sum, scaled by min(1, C / norm) as one vector.

        C is the clip norm.
        """
        found = [parameter for parameter in self.params if parameter.grad is not None]
        norm = _total_norm([parameter.grad for parameter in found])
        # A gradient that is not finite counts as zero, which is within the clip norm. An error instead
        # would tell that such a bag exists.
        finite = math.isfinite(norm)
        self.discarded += not finite
        factor = min(1.0, self.max_grad_norm / norm) if norm else 1.0
        for parameter in found:
            if finite and parameter.summed_grad is None:
                parameter.summed_grad = parameter.grad.mul_(factor)
            elif finite:
                parameter.summed_grad.add_(parameter.grad, alpha=factor)
            parameter.grad = None

    def add_noise(self) -> None:
        """Make the noisy sum the gradient of every parameter, and noise alone where there is no sum.

        The sum is used up, so that a second step cannot use it again.
        """
        for parameter in self.params:
            total = parameter.summed_grad
            # A step without a bag, or a parameter that no bag reached, gets noise as well: a step without
            # noise would tell that no bag was drawn.
            parameter.grad = torch.zeros_like(parameter) if total is None else total
            self._plan.add_noise(parameter.grad, self._round)
            parameter.summed_grad = None

    def scale_grad(self) -> None:
        """Divide the gradients by the expected number of bags."""
        for parameter in self.params:
            # Not by the number of bags drawn, which is private.
            parameter.grad.div_(self.expected_batch_size)

    def pre_step(self, closure: object = None) -> bool:
        """Prepare a step in Opacus's order, without its hooks' per-sample gradients."""
        # Opacus's own begins with per-sample gradients, which one backward pass per bag does not make.
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self.steps += 1
        return True


def _total_norm(gradients: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of several float32 tensors as one vector."""
    if not gradients:
        return 0.0
    # Squares are added up in float32 within pieces, and the pieces in float64. As one float32 sum the
    # norm of 11 M numbers comes out 2e-5 too small (measured), and each bag would exceed its bound by as
    # much. In pieces the error is 1e-9, in the same time, and in a fifth of what float64 alone takes.
    pieces = [
        torch.linalg.vector_norm(gradient.reshape(-1, math.gcd(gradient.numel(), _PIECE)), dim=1)
        for gradient in gradients
    ]
    return float(torch.linalg.vector_norm(torch.cat(pieces), dtype=torch.float64))


def train_round_privately(  # noqa: PLR0913 (a round of training, and its plan)
    model: HierarchicalClassifier,
    store: Bags,
    config: RunConfig,
    round: int,
    plan: PrivacyPlan,
    seeds: TrainingSeeds | None = None,
) -> TrainingResult:
    """Train the model in place for ``plan.steps_per_round`` private steps.

    Batches come from the plan's Poisson sampler, so ``train.bags-per-step``, ``train.local-epochs`` and
    ``train.clip-gradient`` have no effect here; everything else of the configuration has.

    Args:
        model: holds the server's arrays on entry and the site's on return; what ``requires_grad`` is
            trained (see ``common.model.build``).
        store: the site's bags; the held-back ones are not touched.
        config: the run.
        round: 1-based.
        plan: made for this site's training bags.
        seeds: the site's, for everything random but sampling and noise; None for those of a simulation.

    Returns:
        The steps and the bags, which the plan makes public. ``loss`` is ``_WITHHELD`` and ``images`` 0: the
        images that were seen would tell which bags were drawn.

    Raises:
        ConfigError: the model has BatchNorm in training mode, or a part is not for one bag at a time.
        RunError: the plan is not made for these bags, or its promise was broken; nothing may be sent then.
    """
    training = _PrivateRound(
        model, store, config, round, plan, seeds or TrainingSeeds(config.seed, store.name)
    )
    optimiser = training.optimiser
    if config.federation.strategy == Strategy.FEDPROX:
        _pull_towards_server(optimiser, config.federation.proximal_mu)
    for _ in training.sums():
        optimiser.step()
    return training.result(optimiser.steps)


def noised_sum_of_round(  # noqa: PLR0913 (a round of training, its plan, and the grid)
    model: HierarchicalClassifier,
    store: Bags,
    config: RunConfig,
    round: int,
    plan: PrivacyPlan,
    steps_per_unit: float,
    seeds: TrainingSeeds | None = None,
) -> tuple[NDArray[np.int64], TrainingResult]:
    """Return the clipped gradients of a round's one step, with this site's share of the noise.

    Args:
        model: the server's; it is not changed.
        store: as for ``train_round_privately``, like the rest.
        config: the run.
        round: 1-based.
        plan: with shared noise and one step a round.
        steps_per_unit: of the grid of secure aggregation.
        seeds: the site's.

    Returns:
        The sum in steps of the grid, arrays in the order of their names, and what may be told of the round.
    """
    training = _PrivateRound(
        model, store, config, round, plan, seeds or TrainingSeeds(config.seed, store.name)
    )
    found: list[Tensor] = []
    steps = 0
    for _ in training.sums():
        steps += 1
        named = dict(model.named_parameters())
        for name in sorted(name for name, parameter in named.items() if parameter.requires_grad):
            # What this round does not train has no sum, and gets noise alone.
            total = getattr(named[name], "summed_grad", None)
            found.append(torch.zeros_like(named[name]) if total is None else total)
        training.optimiser.zero_grad()
    total = torch.cat([gradient.detach().double().cpu().flatten() for gradient in found]).numpy()
    result = training.result(steps)
    return plan.noised_sum(total, steps_per_unit, round), result


class _PrivateRound:
    """Draw the bags of a round and add up their clipped gradients, step by step."""

    def __init__(  # noqa: PLR0913 (a round of training, and its plan)
        self,
        model: HierarchicalClassifier,
        store: Bags,
        config: RunConfig,
        round: int,
        plan: PrivacyPlan,
        seeds: TrainingSeeds,
    ) -> None:
        self.model, self.store, self.config, self.round, self.plan = model, store, config, round, plan
        self.seeds = seeds
        model.to(choose_device(config.train.device)).train()
        _refuse_batch_norm(model)
        self.training, _ = store.split(config.train.held_back, config.seed)
        if plan.number_of_bags != len(self.training):
            raise RunError(
                f"the privacy plan is made for {plan.number_of_bags} bags, but site {store.name!r} trains on "
                f"{len(self.training)}: make the plan from the bags that are left after holding back"
            )
        self.setting = make_setting(store, config, round, bags=None)
        refuse_unsound(model, self.setting)
        self.optimiser = BagDPOptimizer(_inner_optimiser(model, config, round, plan), plan, round)

    def sums(self) -> Iterator[None]:
        """Yield for each step, once the clipped gradients of its bags are in the optimiser's sums.

        Raises:
            RunError: something else than the optimiser changed the model.
        """
        unchanged = Unchanged(self.model)
        with torch.random.fork_rng(devices=[]):
            for step, drawn in enumerate(self.plan.sampler(self.round)):
                self._add(step, self.training[drawn])
                _refuse_writes(unchanged)
                yield
                unchanged.accept_step()
        _refuse_writes(unchanged)

    def _add(self, step: int, bags: NDArray[np.int64]) -> None:
        model, store, setting, clip_norm = self.model, self.store, self.setting, self.plan.clip_norm
        if centred := centred_in(model, self.config, self.round):
            for bag in bags:
                batch = make_batch(store, np.array([bag])).to(setting.device)
                self.optimiser.add_bag(centring_loss(centred, batch, clip_norm))
        elif suits(model, self.config.model.recipe.terms):
            found = clipped_sum(model, Objective(setting), pieces(store, bags), clip_norm)
            self.optimiser.add_sum(found)
        else:
            for bag in bags.tolist():
                batch = make_batch(store, np.array([bag]))
                seed = self.seeds.of_bag(self.round, step, bag)
                self.optimiser.add_bag(_bag_loss(model, setting, batch, seed))

    def result(self, steps: int) -> TrainingResult:
        """Return what may be told of the round.

        Args:
            steps: that were taken.

        Raises:
            RunError: they are not those that were accounted for.
        """
        # The ledger was charged for the plan's steps: one more would be spending that nobody counted.
        if steps != self.plan.steps_per_round:
            raise RunError(f"{steps} private steps taken, but {self.plan.steps_per_round} accounted for")
        if self.optimiser.discarded:
            log.warning(
                "%(site)s: %(bags)d bag gradients were not finite",
                {"site": self.store.name, "bags": self.optimiser.discarded},
            )
        return TrainingResult(_WITHHELD, steps, len(self.training), 0)


def _inner_optimiser(
    model: HierarchicalClassifier, config: RunConfig, round: int, plan: PrivacyPlan
) -> torch.optim.Optimizer:
    """Build the optimiser that sees the noisy mean gradient, over the parameters that the round trains."""
    if backbone := centred_in(model, config, round):
        steps = config.train.centring_rounds * plan.steps_per_round
        return torch.optim.SGD([backbone.centre], lr=backbone.centring_rate(plan.clip_norm, steps))
    centre = model.backbone.centre if isinstance(model.backbone, FrozenFeatures) else None
    parameters = [p for p in model.parameters() if p.requires_grad and p is not centre]
    # All of it is public. That the mean of the models has less noise does not help the steps before it.
    numbers = sum(parameter.numel() for parameter in parameters)
    noise = plan.noise_multiplier * math.sqrt(numbers) / plan.expected_bags
    start = config.train.learning_rate or rate_by_noise(noise) / plan.clip_norm
    return build_optimiser(parameters, config, run_progress(round, config.rounds), start)


def _bag_loss(model: HierarchicalClassifier, setting: Setting, batch: Batch, seed: int) -> Tensor:
    """Return the loss of one bag, a scalar, on the model's device.

    Args:
        model: in training mode.
        setting: of the round, without the counts of the whole site.
        batch: the bag alone.
        seed: fixes augmentation, dropout and what is random in a term. It must be the bag's own: numbers that
            flow on from bag to bag let one bag change the gradients of those after it, beyond what clipping
            bounds.
    """
    _seed_modules(seed, setting.device)
    generator = torch.Generator().manual_seed(seed)
    batch = batch.augmented(setting.config.train.augmentation, generator)
    # Made anew, so that a term cannot carry anything from one bag to the next.
    return Objective(setting)(model, batch.to(setting.device), generator)


def _seed_modules(seed: int, device: torch.device) -> None:
    """Seed what dropout and stochastic depth of the backbone draw from."""
    if device.type == "cpu":
        # torch.manual_seed formats a stack trace for each kind of accelerator that is not in use, which takes
        # a millisecond for each bag.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _refuse_writes(unchanged: Unchanged) -> None:
    """Refuse a model in which something else than the optimiser's step changed a number.

    Raises:
        RunError: a parameter or a buffer changed; it may hold something of private images.
    """
    if written := unchanged.changed():
        raise RunError(
            f"training changed {written[0]!r} of the model outside of the optimiser's step, which no noise "
            "covers; use another backbone or other parts"
        )


def _refuse_batch_norm(model: nn.Module) -> None:
    """Refuse a model with BatchNorm in training mode.

    Such a layer keeps statistics of private images in buffers that no noise covers.

    Raises:
        ConfigError: there is such a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigError(
                f"private training cannot use BatchNorm ({name!r}): its running statistics come from private "
                "images without noise\nUse model.norm = 'group' or 'frozen-batch'."
            )


def _pull_towards_server(optimiser: BagDPOptimizer, mu: float) -> None:
    """Add the gradient of FedProx's term, mu (w - w_server), after the noise.

    It depends on no data, so it needs neither clipping nor noise.
    """
    server_values = [parameter.detach().clone() for parameter in optimiser.params]

    def pull(_: DPOptimizer) -> None:
        for parameter, value in zip(optimiser.params, server_values, strict=True):
            parameter.grad.add_(parameter.detach() - value, alpha=mu)

    optimiser.attach_step_hook(pull)
