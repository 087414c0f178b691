"""Define the tables of a run's configuration with the bounds and meaning of every key.

What holds between tables, and the forms in which a configuration travels, is in ``common.config``.

Compute the progress of a run and the decay of its learning rate from round numbers.
"""

import math
from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from common.model import methods
from common.model.methods import NO_BLOCK, Recipe
from common.settings_file import Section, nearest


class Norm(StrEnum):
    """Choose the replacement of BatchNorm, whose statistics would mix images across bags and sites."""

    GROUP = "group"
    """GroupNorm: affine weights are kept, running statistics are dropped."""
    FROZEN_BATCH = "frozen-batch"
    """BatchNorm with the statistics of the weights file, as constants; needs a weights file."""


class Strategy(StrEnum):
    """Choose the server's aggregation of the sites' models into the next one."""

    FEDAVG = "fedavg"
    FEDPROX = "fedprox"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"
    FEDPALS = "fedpals"
    """FedAvg whose weights align the sites' label marginals with the target (arXiv 2411.03799)."""
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed-mean"
    KRUM = "krum"


class Transport(StrEnum):
    """Choose the number format in which the arrays of a ModelUpdate travel.

    Both sides compute in 32 bits or more.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    """Rounded to IEEE half precision: half the bytes, a relative error of at most 2**-11."""


class ModelConfig(Section):
    """Hold the settings of the classifier, in pixels, counts or plain numbers."""

    method: str = Field(methods.DEFAULT, description="how bags teach the model: docs/methods.md")
    backbone: str = Field("resnet-small", description="resnet-small, colour-histogram or a torchvision model")
    features: str = Field(
        "",
        description="comma-separated fixed features in place of a trained backbone: backbones, or NAME@FILE",
    )
    block: str = Field("", description="part between backbone and heads, or none; empty: the method's")
    head: str = Field("", description="part that scores the classes of a level; empty: the method's")
    levels: Literal["", "each", "leaf"] = Field(
        "", description="levels with a head; leaf: coarse levels sum the leaves; empty: the method's"
    )
    terms: str = Field("", description="comma-separated terms of the loss; empty: the method's")
    weights: str = Field("", description="local weights file (.safetensors or .pth), or empty")
    norm: Norm = Field(
        Norm.GROUP, description="in place of BatchNorm; frozen-batch keeps the statistics of the weights file"
    )
    image_size: int = Field(32, ge=8, le=1024, description="side of the square input, pixels")
    atoms_per_class: int = Field(8, ge=1, le=256, description="dictionary atoms per class (k)")
    iterations: int = Field(3, ge=1, le=50, description="unrolled ISTA steps (T)")
    dictionary: bool = Field(True, description="lhfglp: switch for the sparse dictionary blocks")
    masks: bool = Field(True, description="lhfglp: switch for the category-aware masks")
    tied: bool = Field(True, description="lhfglp: switch for one distribution over the tree's paths")

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        names = methods.method_names()
        if method not in names:
            raise ValueError(f"there is no such method{nearest(method, names)}; known: {', '.join(names)}")
        return method

    @model_validator(mode="after")
    def _every_part_has_a_use(self) -> Self:
        recipe = self.recipe
        if recipe.leaf_only and (recipe.block != NO_BLOCK or recipe.tied):
            raise ValueError(
                "model.levels = 'leaf' leaves one head, and a block and tied scores need one at every level: "
                "set model.block = 'none' and model.tied = false"
            )
        if self.feature_names and self.weights:
            raise ValueError("model.weights is of a trained backbone: write model.features = 'NAME@FILE'")
        if not recipe.terms:
            raise ValueError("model.terms names no term: there is nothing to learn from")
        return self

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Return the names of the fixed features; empty where the backbone is trained."""
        return tuple(name.strip() for name in self.features.split(",") if name.strip())

    @property
    def recipe(self) -> Recipe:
        """Return the parts of the model and of its loss, with what is left empty taken from the method."""
        usual = methods.recipe(self.method)
        block = self.block or usual.block
        return Recipe(
            block=NO_BLOCK if block == methods.DICTIONARY and not self.dictionary else block,
            head=self.head or usual.head,
            levels=self.levels or usual.levels,
            tied=self.tied and usual.tied,
            terms=tuple(term.strip() for term in self.terms.split(",") if term.strip()) or usual.terms,
        )


class TrainedPart(StrEnum):
    """Choose the part of the model that is trained.

    The rest keeps its values and is never sent.
    """

    AUTO = "auto"
    """``all``; under differential privacy ``norm-head``, since noise grows with what is trained."""
    ALL = "all"
    NORM_HEAD = "norm-head"
    """Heads, dictionary, and the scales and shifts of the backbone's normalisation layers."""
    HEAD = "head"
    """Heads and dictionary; the backbone is a fixed map from images to features."""


class LossConfig(Section):
    """Hold the settings of the hierarchical proportion loss, whose weights are relative and >= 0."""

    coarse_weight: float = Field(0.1, ge=0, le=100, description="weight of each level above leaf, final")
    anneal_from: float = Field(
        0.3,
        ge=0,
        le=100,
        description="weight of each level above leaf in round 1; falls linearly to coarse-weight",
    )
    anneal_share: float = Field(0.5, ge=0, le=1, description="share of the rounds the fall takes")
    reconstruction: float = Field(0.01, ge=0, le=100, description="alpha of the reconstruction error")
    sparsity: float = Field(0.0001, ge=0, le=100, description="beta of the l1 norm of the codes")
    refinement: float = Field(
        0.8,
        ge=0,
        le=1,
        description="lhfglp: share of refined labels in the loss; 0: off",
    )
    temperature: float = Field(
        0.5, ge=0.05, le=100, description="entropy of refined labels; 1 is an E-step, small is hard"
    )


class Augmentation(StrEnum):
    """Choose the random changes of an image each time that it is trained on.

    The label counts of a bag are not changed.
    """

    FULL = "full"
    """Flips, quarter turns, small shifts, brightness and contrast."""
    SHIFT = "shift"
    """Without flips and turns: for classes that differ by them, as signs, letters and vehicles do."""
    NONE = "none"


class TrainConfig(Section):
    """Hold the settings of local training at a site."""

    local_epochs: int = Field(1, ge=1, le=1000, description="passes over the site's bags per round")
    rounds_per_pass: int = Field(
        1, ge=1, le=100_000, description="rounds that share one pass; above 1 sites are averaged more often"
    )
    bags_per_step: int = Field(2, ge=1, le=4096, description="bags per optimiser step")
    optimiser: Literal["sgd", "adamw"] = Field("adamw", description="at the sites, made anew in each round")
    learning_rate: float = Field(
        0.002,
        ge=0,
        le=10,
        description="at round 1; cosine to 5% at the end; 0: by the noise of a private run",
    )
    weight_decay: float = Field(0.0001, ge=0, le=1, description="of the optimiser")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    clip_gradient: float = Field(5.0, gt=0, le=1e6, description="norm the step's gradient is clipped to")
    augmentation: Augmentation = Field(
        Augmentation.FULL, description="full: flips, quarter turns, shifts, light; shift: the last two; none"
    )
    part: TrainedPart = Field(
        TrainedPart.AUTO, description="what is trained; auto: all, and norm-head under dp"
    )
    centring_rounds: int = Field(
        1, ge=0, le=100_000, description="with model.features: first rounds, which learn their mean"
    )
    held_back: float = Field(0.1, ge=0, le=0.9, description="share of bags held back for selection")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads: int = Field(1, ge=1, le=256, description="torch threads per site; 1 is bitwise repeatable")


class FederationConfig(Section):
    """Hold the settings of participation, waiting and aggregation."""

    strategy: str = Field(Strategy.FEDAVG.value, description="makes the next model of the sites' updates")
    sites: int = Field(5, ge=1, le=100_000, description="sites the server waits for at the start")
    quorum: int = Field(1, ge=1, le=100_000, description="fewest good updates that make a round")
    deadline: float = Field(3600.0, gt=0, le=1e7, description="seconds to wait for replies in a round")
    enrol_deadline: float = Field(600.0, gt=0, le=1e7, description="seconds to wait for sites to appear")
    patience: float = Field(
        3600.0, ge=0, le=1e7, description="seconds below the quorum before the run gives up"
    )
    allow: str = Field("", description="comma-separated site names that may take part; empty: all")
    statements: str = Field(
        "", description="folder where sites' privacy statements outlive a run; empty: the run's own"
    )
    max_update_mb: float = Field(1024.0, gt=0, le=1e6, description="largest update accepted, MiB")
    max_change: float = Field(
        1000.0, gt=0, le=1e30, description="largest change accepted: L2 norm / (1 + norm of the model)"
    )
    transport: Transport = Field(
        Transport.FLOAT32, description="numbers on the wire; float16 halves the bytes"
    )
    proximal_mu: float = Field(0.01, ge=0, le=100, description="FedProx: weight of the proximal term")
    server_learning_rate: float = Field(1.0, gt=0, le=100, description="fedavgm, fedadam, fedyogi")
    server_decay: bool = Field(
        False, description="fedavgm, fedadam, fedyogi: the server's rate falls as the sites' does"
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="fedavgm momentum; fedadam/fedyogi beta 1")
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed-mean: share cut at each end")
    byzantine: int = Field(0, ge=0, le=100_000, description="krum: sites assumed malicious")
    pals_target: Literal["uniform", "pooled"] = Field(
        "uniform", description="fedpals: label marginal to align with; pooled: that of all sites"
    )
    pals_regularisation: float = Field(
        0.1, ge=0, le=1e6, description="fedpals: 0 aligns label marginals, large weighs by bags"
    )


class DPConfig(Section):
    """Hold the settings of bag-level differential privacy that the run asks for.

    A site's own budget (site.toml) wins over them.
    """

    epsilon: float = Field(
        0.0,
        ge=0,
        le=1e4,
        description="most that one run may spend at each site, replace-one bag; 0: not private",
    )
    # At delta = 1 / N a mechanism that publishes one of N bags entirely would count as private.
    delta: float = Field(1e-4, gt=0, lt=1, description="must be below 1 / bags of every site")
    clip_norm: float = Field(
        0.5, ge=1e-6, le=1e6, description="norm that the gradient of each bag is clipped to"
    )
    expected_bags: float = Field(
        32.0, gt=0, le=1e6, description="mean bags per step (at most all of a site's)"
    )
    sample_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance of each bag to be in a step; 0: dp.expected-bags / bags of a site",
    )
    steps_per_round: int = Field(4, ge=1, le=100_000, description="optimiser steps of a private round")
    release_scale: float = Field(
        8.0, gt=0, le=1e6, description="noise of released counts / images of the largest bag; costs 2 / scale"
    )
    metrics_scale: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="noise of held-back figures / one bag, if sites allow it; each costs 2 / scale; 0: off",
    )
    noise: Literal["local", "shared"] = Field(
        "local",
        description="shared: under secure aggregation the sites' noises add up to one, if sites allow it",
    )
    colluders: int = Field(
        0, ge=0, le=100_000, description="shared noise: sites of a sum that may work with the server"
    )
    force_delta: bool = Field(False, description="accept delta >= 1 / bags; the report marks it")


class SecureAggregationConfig(Section):
    """Hold the settings of SecAgg+, under which the server sees only the sum of the updates.

    See docs/secure-aggregation.md.
    """

    enabled: bool = Field(False, description="the server sees only the sum of the updates")
    threshold_share: float = Field(
        0.66, gt=0.5, le=1, description="share of the sites that must stay, for the sum to be unmasked"
    )
    neighbours: int = Field(
        0, ge=0, le=10_000, multiple_of=2, description="sites that each shares masks with; 0: all others"
    )
    clip_range: float = Field(
        16.0, ge=0.01, le=1e6, description="each coordinate of an update is clipped to +-this"
    )
    minimum_sites: int = Field(
        3, ge=2, le=100_000, description="fewest sites in a sum; a site that demands more gets more"
    )
    certificates: str = Field(
        "", description="the server's folder of SITE.crt, for sites that do not send their own"
    )


class EvaluationConfig(Section):
    """Hold the schedule of evaluations on held-back bags."""

    every: int = Field(1, ge=1, le=10_000, description="rounds between looks at the held-back bags")

    def is_due(self, round: int, rounds: int) -> bool:
        """Return True if the held-back bags are evaluated after this round of ``rounds``.

        They always are after the last round.
        """
        return round % self.every == 0 or round == rounds

    def looks(self, rounds: int) -> int:
        """Return the number of evaluations on held-back bags in a run of ``rounds``."""
        return -(-rounds // self.every)


LARGEST_RATE = 5.0
"""The learning rate of steps without noise, where ``train.learning-rate`` is 0."""
_RATE_BY_NOISE, _LEAST_RATE = 3.0, 0.25


def rate_by_noise(noise: float) -> float:
    """Return the learning rate of SGD that suits a noise, for gradients clipped to norm 1.

    It falls with the length of the noise in a step's mean gradient: the more of a step is noise, the more
    steps have to be averaged. Factor and bounds were found on images that
    were held back from training (docs/privacy.md).

    Args:
        noise: root mean square length of the noise, relative to the clip norm.
    """
    return min(max(_RATE_BY_NOISE / max(noise, 1e-9), _LEAST_RATE), LARGEST_RATE)


_FLOOR = 0.05
"""Share of its start that a learning rate ends at."""


def run_progress(round: int, rounds: int) -> float:
    """Return the share of the run that is done when ``round`` (1-based) starts.

    It is 0 in the first round and 1 in the last.
    """
    return (round - 1) / max(rounds - 1, 1)


def cosine_decay(progress: float) -> float:
    """Return the factor of the learning rate at ``progress`` in [0, 1].

    It falls from 1 to 0.05 along half a cosine (Loshchilov & Hutter 2017, eq. 5).
    """
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
