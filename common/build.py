"""Build the model that a configuration names.

This is the only place where methods become switches of the model.
"""

from pathlib import Path

import torch

from common.backbones import build_backbone
from common.config_tables import ModelConfig, Norm
from common.errors import ConfigError
from common.hierarchy import Hierarchy
from common.lhfglp import LHFGLP
from common.methods import Method


def build_model(config: ModelConfig, hierarchy: Hierarchy, seed: int) -> LHFGLP:
    """Build a model with weights fixed by ``seed``, leaving torch's global generator as it was.

    The baselines are LHFGLP with its blocks switched off, even where ``config`` switches them on, so that
    all methods share one pipeline.

    Args:
        config: what to build.
        hierarchy: the label tree.
        seed: fixes every random weight; the parts that two methods share get the same ones.

    Raises:
        ConfigError: frozen BatchNorm without a weights file; and see build_backbone.
        UserError: see build_backbone.
    """
    if config.norm is Norm.FROZEN_BATCH and not config.weights:
        raise ConfigError(
            "model.norm = 'frozen-batch' freezes BatchNorm at the statistics of a weights file; "
            "give one as model.weights, or use model.norm = 'group'"
        )
    return _build(config, hierarchy, seed, Path(config.weights) if config.weights else None)


def rebuild_model(config: ModelConfig, hierarchy: Hierarchy) -> LHFGLP:
    """Build the architecture for values that a file or a message brings.

    No weights file is read. Frozen BatchNorm gets its statistics with those values.
    """
    return _build(config, hierarchy, seed=0, weights=None)


def _build(config: ModelConfig, hierarchy: Hierarchy, seed: int, weights: Path | None) -> LHFGLP:
    plain = config.method is not Method.LHFGLP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LHFGLP(
            build_backbone(config.backbone, config.norm, weights, config.image_size),
            hierarchy,
            atoms_per_class=config.atoms_per_class,
            iterations=config.iterations,
            dictionary=config.dictionary and not plain,
            masks=config.masks and not plain,
            tied=config.tied and not plain,
            leaf_only=config.method.leaf_only,
        )
