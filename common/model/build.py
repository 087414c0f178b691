"""Build the model that a configuration names from its parts, and choose the parameters that a run trains.

The parameters that a run does not train keep the values they have, and are never sent. Noise for privacy is
added to every trained parameter, so its norm grows with their number: a private run trains few.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common import parts
from common.config_tables import ModelConfig, Norm, TrainedPart
from common.errors import ConfigError
from common.hierarchy import Hierarchy
from common.model.backbones import build_backbone
from common.model.classifier import HierarchicalClassifier, Levels, Pieces
from common.model.features.frozen import FrozenFeatures
from common.model.interfaces import Level
from common.model.methods import NO_BLOCK
from common.parts import Kind
from common.settings_file import Section

_NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _BatchNorm, _InstanceNorm)

Settings = Mapping[str, Section]
"""Of the parts, by their names, as in ``RunConfig.parts``; a part that is missing has its defaults."""


def build_model(
    config: ModelConfig, hierarchy: Hierarchy, seed: int, settings: Settings | None = None
) -> HierarchicalClassifier:
    """Build a model with weights fixed by ``seed``, leaving torch's global generator as it was.

    Args:
        config: what to build.
        hierarchy: the label tree.
        seed: fixes every random weight; the parts that two methods share get the same ones.
        settings: of the parts.

    Raises:
        ConfigError: frozen BatchNorm without a weights file, or an unknown part; and see build_backbone.
        UserError: see build_backbone.
    """
    if config.norm is Norm.FROZEN_BATCH and not config.weights:
        raise ConfigError(
            "model.norm = 'frozen-batch' freezes BatchNorm at the statistics of a weights file; "
            "give one as model.weights, or use model.norm = 'group'"
        )
    with _repeatable(seed):
        return _build(config, hierarchy, settings or {}, Path(config.weights) if config.weights else None)


def rebuild_model(
    config: ModelConfig, hierarchy: Hierarchy, settings: Settings | None = None
) -> HierarchicalClassifier:
    """Build the architecture for values that a file or a message brings.

    No weights file is read. Frozen BatchNorm gets its statistics with those values.
    """
    with _repeatable(0):
        return _build(config, hierarchy, settings or {}, weights=None)


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Seed torch and hold it to one thread, then put its generator and its threads back.

    An orthogonal start comes from a QR decomposition, whose last bits depend on the number of threads: the
    server would draw another model on another machine.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed accelerators too, and takes milliseconds to find that there are none.
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _build(
    config: ModelConfig, hierarchy: Hierarchy, settings: Settings, weights: Path | None
) -> HierarchicalClassifier:
    recipe = config.recipe
    backbone = (
        FrozenFeatures(config.feature_names, config.image_size)
        if config.feature_names
        else build_backbone(config.backbone, config.norm, weights, config.image_size)
    )
    levels = range(len(hierarchy.sizes))

    def at(level: int) -> Level:
        return Level(backbone.n_features, backbone.map_shape, hierarchy, level, config)

    def made(kind: Kind, name: str, level: int) -> nn.Module:
        part = parts.part(kind, name)
        own = settings.get(name, part.settings())
        module: nn.Module = part.build(at(level), own)
        return module

    # The heads come first, so that methods with blocks and without draw the same random numbers for them.
    heads = [made(Kind.HEAD, recipe.head, level) for level in (levels[-1:] if recipe.leaf_only else levels)]
    blocks = [made(Kind.BLOCK, recipe.block, level) for level in levels] if recipe.block != NO_BLOCK else []
    terms = {}
    for name in recipe.terms:
        part = parts.part(Kind.TERM, name)
        if part.modules is not None:
            terms[name] = part.modules(at(levels[-1]), settings.get(name, part.settings()))
    return HierarchicalClassifier(
        hierarchy,
        Pieces(backbone=backbone, heads=heads, blocks=blocks, terms=terms),
        Levels(masks=config.masks and bool(blocks), tied=recipe.tied, leaf_only=recipe.leaf_only),
    )


def trainable_parameters(model: HierarchicalClassifier, part: TrainedPart) -> list[nn.Parameter]:
    """Freeze everything outside ``part`` and free everything inside it.

    ``requires_grad`` of every parameter is set, whatever it was, so the choice can be changed;
    ``common.model.model_file.trainable_arrays`` then holds exactly the parameters returned.

    Returns:
        The trained parameters in the order of ``model.parameters()``; never empty, for a model has heads.
    """
    model.requires_grad_(part is TrainedPart.ALL)
    if isinstance(model.backbone, FrozenFeatures):
        model.backbone.centre.requires_grad_(True)
    if part is not TrainedPart.ALL:
        for trained in (model.heads, model.blocks, model.terms):
            trained.requires_grad_(True)
    if part is TrainedPart.NORM_HEAD:
        for module in model.backbone.modules():
            if isinstance(module, _NORMALISATIONS):
                module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
