"""Build the model that a configuration names.

This is the only place where methods become switches of the model.

Choose the parameters that a run trains.

The rest keep the values they have, and are never sent.

Noise for privacy is added to every trained parameter, so its norm grows with their number: a private run
trains few. This module knows nothing of training and privacy.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.config_tables import ModelConfig, Norm, TrainedPart
from common.errors import ConfigError
from common.hierarchy import Hierarchy
from common.model.backbones import build_backbone
from common.model.lhfglp import LHFGLP, Architecture
from common.model.methods import Method


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
            Architecture(
                atoms_per_class=config.atoms_per_class,
                iterations=config.iterations,
                dictionary=config.dictionary and not plain,
                masks=config.masks and not plain,
                tied=config.tied and not plain,
                leaf_only=config.method.leaf_only,
            ),
        )


NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _BatchNorm, _InstanceNorm)


def trainable_parameters(model: LHFGLP, part: TrainedPart) -> list[nn.Parameter]:
    """Freeze everything outside ``part`` and free everything inside it.

    ``requires_grad`` of every parameter is set, whatever it was, so the choice can be changed;
    ``common.model.model_file.trainable_arrays`` then holds exactly the parameters returned.

    Returns:
        The trained parameters in the order of ``model.parameters()``; never empty, for a model has heads.
    """
    model.requires_grad_(part is TrainedPart.ALL)
    if part is not TrainedPart.ALL:
        model.heads.requires_grad_(True)
        model.blocks.requires_grad_(True)
    if part is TrainedPart.NORM_HEAD:
        for module in model.backbone.modules():
            if isinstance(module, NORMALISATIONS):
                module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
