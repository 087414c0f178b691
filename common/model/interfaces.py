"""Define what the parts of a model are given and what they give back.

A model is a backbone, then for every level of the label tree, coarse to fine, a block (if there is one) and a
head. Whoever calls a model builds ``Inputs``; no caller is special. This module knows nothing of losses,
files or sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.config_tables import ModelConfig
from common.hierarchy import Hierarchy


@dataclass(frozen=True)
class Inputs:
    """Hold everything that a model may look at."""

    images: Tensor
    """Shape (N, 3, S, S), floating, scaled as the model's card says (x / 127.5 - 1); S = 0 where ``features``
    stand for the images."""
    bag_index: Tensor
    """Shape (N,) int64: the bag of each image, from 0; the images of a bag are consecutive."""
    metadata: Tensor | None = None
    """Shape (N, M), scaled by public ranges, NaN where not known; None where a run has no metadata."""
    features: Tensor | None = None
    """Shape (N, F): the run's fixed features where they were computed before; None: the images give them."""

    @classmethod
    def alone(cls, images: Tensor, metadata: Tensor | None = None) -> "Inputs":
        """Return images each in a bag of its own, as in prediction and on labelled test images."""
        return cls(images, torch.arange(len(images), device=images.device), metadata)

    @classmethod
    def of_features(cls, features: Tensor, bag_index: Tensor) -> "Inputs":
        """Return inputs in which fixed features stand for the images."""
        return cls(features.new_empty(len(features), 3, 0, 0), bag_index, features=features)

    def __len__(self) -> int:
        """Return N, the number of images."""
        return len(self.images)

    def take(self, rows: Tensor, bag_index: Tensor) -> "Inputs":
        """Return the images at these positions (M,), in the bags given for them (M,)."""
        metadata, features = (
            None if values is None else values[rows] for values in (self.metadata, self.features)
        )
        return Inputs(self.images[rows], bag_index, metadata, features)

    def with_images(self, images: Tensor) -> "Inputs":
        """Return the same bags and metadata with other images."""
        return replace(self, images=images, features=None)

    def to(self, device: torch.device) -> "Inputs":
        """Return the same inputs on a device."""
        metadata, features = (
            None if values is None else values.to(device) for values in (self.metadata, self.features)
        )
        return Inputs(self.images.to(device), self.bag_index.to(device), metadata, features)


@dataclass(frozen=True)
class Level:
    """Tell the maker of a block, a head or a term's module where it will stand."""

    n_features: int
    """d, length of the pooled feature."""
    map_shape: tuple[int, int, int] | None
    """(c, H, H) of the map, or None where the backbone has none."""
    hierarchy: Hierarchy
    index: int
    """Of the level, 0 for the coarsest."""
    config: ModelConfig

    @property
    def n_classes(self) -> int:
        """Return the number of classes of the level."""
        return self.hierarchy.sizes[self.index]


class Features(NamedTuple):
    """Hold what a backbone sees in N images."""

    pooled: Tensor
    """Shape (N, d)."""
    map: Tensor | None = None
    """Shape (N, c, H, H): the last map of at least 6 positions across, else the finest; None without one."""


class Refined(NamedTuple):
    """Hold what a block makes of features at one level."""

    features: Features
    evidence: Mapping[str, Tensor]
    """By name, shape (N, ...): what explains the decision, such as codes; stored with no model."""
    penalties: Mapping[str, Tensor]
    """By name, shape (N,): what a loss term may charge for; added up over the levels."""


class Output(NamedTuple):
    """Hold a model's output for N images."""

    scores: tuple[Tensor, ...]
    """Per level (N, C_l): logits; log-probabilities where coarse levels are summed up the tree."""
    features: Features
    """Of the backbone, before any block."""
    evidence: Mapping[str, tuple[Tensor | None, ...]]
    """By name one entry per level: of blocks and heads."""
    penalties: Mapping[str, Tensor]
    """By name, shape (N,), float32: of blocks."""


class Backbone(Protocol):
    """Map inputs to features."""

    n_features: int
    """d, length of the pooled feature."""
    map_shape: tuple[int, int, int] | None
    """(c, H, H), or None without a map."""

    def __call__(self, inputs: Inputs) -> Features:
        """Return the features of N images."""
        ...

    def tail(self, map: Tensor) -> Tensor:
        """Return the pooled feature (N, d) that follows from a map (N, c, H, H) in place of the own one."""
        ...


class Block(Protocol):
    """Refine the features at one level."""

    def __call__(self, inputs: Inputs, features: Features, parents: Tensor | None) -> Refined:
        """Return refined features with evidence and penalties.

        Args:
            inputs: what the model looks at.
            features: of the level above, or the backbone's at the first level.
            parents: for each class of this level the probability of its parent, shape (N, C_l), without a
                graph; None at the first level and without masks.
        """
        ...


class Head(Protocol):
    """Score the classes of one level."""

    def __call__(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return scores (N, C_l) and evidence by name, shape (N, ...)."""
        ...
