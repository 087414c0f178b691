"""Put canary bags into a site's training, and score from the models which of them were trained on.

The real private training runs (plan, sampler, ``train_round_privately``, ``BagDPOptimizer``), so that a bug
in it shows. The auditor sees what the server sees, the model before and after every round, and knows every
canary's direction. This is the white-box audit with canaries in gradient space of Steinke, Nasr & Jagielski
2023 (arXiv 2305.08846, section 6). DP-SGD promises its epsilon for whatever gradients the bags have, so
canaries may have gradients that are easiest to detect, far too long and each in parameters of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from client.data.bags import Bag, BagStore
from client.data.images import to_tensor
from client.private_training import train_round_privately
from client.training import choose_device
from common.config import RunConfig
from common.errors import RunError, UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model, trainable_parameters
from common.model.interfaces import Inputs, Output
from common.privacy.plan import PrivacyPlan

_CANARY_SIZE = 8
"""Images of a canary bag: clipping image by image lets as many times the clip norm through, and shows."""
_LOUDNESS = 50.0
"""Length of a canary's gradient before clipping, in clip norms; real bags come to about 10."""
_PIXELS = 8
"""Pixels of the first row by which a canary's image is known: 24 random bytes, and images are no smaller."""


@dataclass(frozen=True)
class CanaryStore:
    """Hold a site's bags followed by one slot per canary, which holds the canary or an empty bag.

    Training reads it like a site's own store (``client.data.bags.Bags``). The number of bags, which is
    public, therefore does not depend on the coins. An empty bag has no gradient (see ``Directions``), so a
    coin adds or removes one bag's clipped gradient, which is add/remove of one bag.
    """

    own: BagStore
    """The site's own bags, which keep their numbers."""
    images: NDArray[np.uint8]
    """Shape (m + 1, S, S, 3): random pixels that name each canary; the last one is the empty bag's."""
    included: NDArray[np.bool_]
    """Shape (m,): the coins."""

    @classmethod
    def insert(cls, store: BagStore, number: int, rng: np.random.Generator) -> Self:
        """Return ``store`` with ``number`` slots and a fair coin for each."""
        shape = (number + 1, *store[0].images.shape[1:])
        return cls(
            own=store,
            images=rng.integers(0, 256, shape, dtype=np.uint8),
            included=rng.integers(0, 2, number).astype(np.bool_),
        )

    @property
    def name(self) -> str:
        """Return the site's name."""
        return self.own.name

    @property
    def hierarchy(self) -> Hierarchy:
        """Return the site's label tree."""
        return self.own.hierarchy

    @property
    def leaf_counts(self) -> NDArray[np.int64]:
        """Return the counts of the site's own bags."""
        return self.own.leaf_counts

    def __len__(self) -> int:
        return len(self.own) + len(self.included)

    def __getitem__(self, index: int) -> Bag:
        slot = index - len(self.own)
        if slot < 0:
            return self.own[index]
        there = self.included[slot]
        # The empty bag has one image, by which the forward hook recognises it.
        size = _CANARY_SIZE if there else 1
        counts = np.zeros(self.hierarchy.sizes[-1], dtype=np.int64)
        counts[0] = size
        return Bag(f"canary-{slot}", np.repeat(self.images[[slot if there else -1]], size, axis=0), counts)

    def split(self, held_back: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the site's own split, with every slot added to the training bags."""
        # The site's split must not see the slots: one that is held back would never be trained on.
        training, rest = self.own.split(held_back, seed)
        return np.concatenate([training, np.arange(len(self.own), len(self))]), rest


class Directions:
    """Give each canary a gradient in a random direction within parameters that are its alone.

    As a forward hook of the model it leaves the scores of real images unchanged. For a canary it returns
    scores that are constant except for their derivative, so that loss, backward pass, clipping and all that
    follows are the real ones.

    Args:
        parameters: the trained ones, P numbers in all.
        store: whose canaries these are.
        length: of each canary's gradient.
        rng: draws the directions.
    """

    def __init__(
        self, parameters: list[nn.Parameter], store: CanaryStore, length: float, rng: np.random.Generator
    ) -> None:
        self._parameters = parameters
        device, number = parameters[0].device, len(store.included)
        size = sum(parameter.numel() for parameter in parameters)
        if size < number:
            raise UserError(f"{size} trained parameters cannot tell {number} canaries apart; take fewer")
        self._owner = torch.from_numpy(rng.permutation(size) % number).to(device)
        """Shape (P,): the canary that each parameter belongs to."""
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size)).float().to(device)
        self._unit = signs / torch.bincount(self._owner, minlength=number).sqrt()[self._owner]
        """Shape (P,): the directions, each of norm 1 within its canary's parameters."""
        self._names = to_tensor(store.images)[:, :, 0, :_PIXELS].flatten(1).to(device)
        # The slope of KL against the leaf that all of a canary's images have, at equal scores.
        self._factor = length / (1 - 1 / store.hierarchy.sizes[-1])

    def __call__(self, model: nn.Module, inputs: tuple[Inputs], output: Output) -> Output | None:
        """Return the scores of a canary or the empty bag, or None to keep those that the model computed."""
        found = (self._names == inputs[0].images[0, :, 0, :_PIXELS].flatten()).all(dim=1).nonzero()
        if not len(found):
            return None
        # All zero for the empty bag, whose number is no canary's, so its gradient is 0.
        mine = (self._owner == found[0]).to(self._unit.dtype)
        along = parameters_to_vector(self._parameters) @ (self._unit * mine)
        scores = [level.new_zeros(level.shape) for level in output.scores]
        # Descent raises the score of the leaf that the canary claims, and so moves along the direction.
        scores[-1][:, 0] = self._factor * (along - along.detach())
        return Output(tuple(scores), output.features, {}, {})

    def along(self, move: Tensor) -> Tensor:
        """Return how far a move of the model, shape (P,), goes along each canary's direction, shape (m,)."""
        sums = torch.zeros(len(self._names) - 1, device=move.device)
        return sums.index_add(0, self._owner, move * self._unit).cpu()


def score_canaries(
    store: CanaryStore,
    config: RunConfig,
    plan: PrivacyPlan,
    rng: np.random.Generator,
    progress: Callable[[], None],
) -> NDArray[np.float64]:
    """Train through all rounds and return a score per canary, shape (m,).

    The higher the score, the more likely the canary was trained on.

    Args:
        store: with canaries; nothing but training looks at its coins.
        config: the run, without augmentation, by which canaries would not be known again.
        plan: made for all of the store's training bags.
        rng: draws the canaries' directions.
        progress: called after every round.

    Raises:
        UserError: fewer parameters are trained than there are canaries.
        RunError: the private training broke its promise, or left a model that is not finite.
    """
    model = build_model(config.model, store.hierarchy, config.seed, config.parts)
    model.to(choose_device(config.train.device))
    parameters = trainable_parameters(model, config.trained_part)
    directions = Directions(parameters, store, _LOUDNESS * plan.clip_norm, rng)
    model.register_forward_hook(directions)
    scores = torch.zeros(len(store.included))
    for round in range(1, plan.rounds + 1):
        before = parameters_to_vector(parameters).detach().clone()
        train_round_privately(model, store, config, round, plan)
        move = parameters_to_vector(parameters).detach() - before
        if not torch.isfinite(move).all():
            raise RunError(f"the model is not finite after private round {round}: nothing can be audited")
        # Learning rates fall from round to round. At unit length the late rounds count as much as the first.
        scores += directions.along(move / move.norm().clamp_min(1e-30))
        progress()
    return scores.double().numpy()


def count_right(scores: NDArray[np.float64], included: NDArray[np.bool_], guesses: int) -> int:
    """Return the number of right guesses when only the highest and lowest scores are guessed.

    The highest scores are guessed to be included and the lowest not, half of the guesses each. The rest is
    not guessed.
    """
    order = np.argsort(scores)
    lowest, highest = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int((~included[lowest]).sum() + included[highest].sum())
