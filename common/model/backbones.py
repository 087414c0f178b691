"""Build the network that maps images to features: a registered part, or a torchvision model by its name.

The classifier is removed, BatchNorm replaced, in-place activations made out of place. A named model keeps
its official stem at every image size: a name means the published architecture, with or without its weights,
and 'resnet-small' is there for small images. This module knows nothing of label trees or bags.
"""

import difflib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common import parts
from common.config_tables import Norm
from common.errors import ConfigError, UserError, require_file
from common.model.interfaces import Features, Inputs
from common.parts import Kind

_MAX_GROUPS = 32
_LEAST_SIDE = 6
"""Positions across a feature map below which it is too coarse to point at anything."""


class Backbone(nn.Module):
    """Wrap a network without its classifier, and offer the map that it pools.

    Args:
        body: the network; maps (N, 3, S, S) to (N, n_features).
        n_features: length of the pooled feature.
        ignored_weights: names in the weights file that belong to the removed classifier.
    """

    def __init__(self, body: nn.Module, n_features: int, ignored_weights: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.body = body
        self.n_features = n_features
        self.ignored_weights = ignored_weights
        self.map_shape: tuple[int, int, int] | None = None
        self._image_size = 0
        self._map_at: tuple[str, int] | None = None
        """The module within ``body`` whose output is the map, and at which of its calls."""

    def forward(self, inputs: Inputs) -> Features:
        """Return the features of N images."""
        found: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            found.append(_channels_first(output))
            # The network goes on from the kept map, so that gradients with respect to it exist.
            return found[0] if found[0] is output else found[0].permute(0, 2, 3, 1)

        with self._at_the_map(keep):
            pooled: Tensor = self.body(inputs.images)
        return Features(pooled, found[0] if found else None)

    def tail(self, map: Tensor) -> Tensor:
        """Return the pooled feature (N, d) that follows from a map (N, c, H, H) in place of the own one.

        The layers before the map run on blank images, and what they give is thrown away: so it works for
        every network, and costs a whole forward pass.

        Raises:
            ConfigError: the network has no map.
        """
        if self._map_at is None:
            raise ConfigError("this backbone has no feature map: choose a convolutional one")

        def replace(output: Tensor) -> Tensor:
            return map if _channels_first(output) is output else map.permute(0, 2, 3, 1)

        side = self._image_size
        with self._at_the_map(replace):
            pooled: Tensor = self.body(map.new_zeros(len(map), 3, side, side))
        return pooled

    def find_map(self, image_size: int) -> None:
        """Choose the map: the last square one of at least 6 positions across, or else the finest.

        It is (N, C, H, W) or (N, H, W, C) with H = W > 1. Maps before a sequence of tokens (N, T, C), such as
        the patches of a ViT, are no feature maps: what was learned is in the tokens. Runs two blank images.

        Raises:
            ConfigError: the network gives something else than one pooled feature per image.
            RuntimeError, ValueError, AssertionError: of the network, which does not take images of this size.
        """
        self._image_size = image_size
        maps: list[tuple[int, int, str, int]] = []
        calls: dict[str, int] = {}

        def remember(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                calls[path] = calls.get(path, -1) + 1
                if not isinstance(output, Tensor):
                    return
                if output.ndim == 3:
                    maps.clear()
                elif output.ndim == 4 and output.requires_grad and _side(output) > 1:
                    maps.append((_side(output), _channels_first(output).shape[1], path, calls[path]))

            return hook

        hooks = [module.register_forward_hook(remember(path)) for path, module in self.body.named_modules()]
        try:
            with torch.enable_grad():
                pooled = self.body(torch.zeros(2, 3, image_size, image_size))
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(pooled, Tensor) or pooled.shape != (2, self.n_features):
            raise ConfigError("it does not give one pooled feature per image; choose another")
        fine = [found for found in maps if found[0] >= _LEAST_SIDE]
        # The last of the finest maps is wanted, and max() alone would return the first.
        best = fine[-1] if fine else max(reversed(maps), key=lambda found: found[0], default=None)
        self._map_at = self.map_shape = None
        if best:
            side, channels, path, call = best
            self._map_at = (path, call)
            self.map_shape = (channels, side, side)

    @contextmanager
    def _at_the_map(self, action: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Call ``action`` with the map while the network runs; what it returns takes the map's place."""
        if self._map_at is None:
            yield
            return
        path, wanted = self._map_at
        calls = 0

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            nonlocal calls
            calls += 1
            return action(output) if calls == wanted + 1 else None

        handle = self.body.get_submodule(path).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def backbone_names() -> list[str]:
    """Return every name that ``build_backbone`` knows."""
    models = _torchvision().models
    named: list[str] = models.list_models(module=models)
    return [*parts.names(Kind.BACKBONE), *named]


def _torchvision() -> Any:
    # Imported here: it takes as long as torch itself, and a run of our own backbones needs nothing of it.
    import torchvision

    return torchvision


def build_backbone(name: str, norm: Norm, weights: Path | None, image_size: int) -> Backbone:
    """Build a backbone with given weights, or random ones from torch's global generator.

    Args:
        name: a registered part or a torchvision classification model (see backbone_names).
        norm: what replaces BatchNorm. FROZEN_BATCH without weights freezes mean 0 and variance 1, a
            placeholder for statistics that are loaded later; build_model refuses it.
        weights: state dict of the named model in torchvision's own names (.safetensors, or .pth read
            with ``weights_only``), or None for random weights.
        image_size: side of the square input in pixels.

    Raises:
        ConfigError: unknown name, or a model without a linear classifier or that cannot take this size.
        UserError: the weights file is missing, unreadable, or of another model.
    """
    if name in parts.names(Kind.BACKBONE):
        backbone = _of_part(name, weights, image_size)
    else:
        body = _torchvision_model(name, image_size)
        path, classifier = _last_linear(name, body)
        ignored = _load_weights(body, weights, classifier=path) if weights is not None else ()
        body.set_submodule(path, nn.Identity())
        backbone = Backbone(body, classifier.in_features, ignored)
    _replace_batch_norm(backbone.body, norm)
    for module in backbone.body.modules():
        # Per-example gradient hooks need every activation as it was, and an in-place layer overwrites it.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    try:
        backbone.find_map(image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.backbone = {name!r} does not take images of {image_size} px: {error}\n"
            "Raise model.image-size, or choose another model."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"model.backbone = {name!r}: {error}") from error
    return backbone


def _of_part(name: str, weights: Path | None, image_size: int) -> Backbone:
    built = parts.part(Kind.BACKBONE, name).build(image_size)
    backbone = built if isinstance(built, Backbone) else Backbone(built, built.n_features)
    if weights is not None:
        if not list(backbone.parameters()):
            raise ConfigError(f"model.backbone = {name!r} has no weights: leave model.weights empty")
        _load_weights(backbone.body, weights, classifier="")
    return backbone


def _torchvision_model(name: str, image_size: int) -> nn.Module:
    known = backbone_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        own = ", ".join(parts.names(Kind.BACKBONE))
        raise ConfigError(
            f"model.backbone = {name!r} is neither one of {own} nor a torchvision classification model{hint}"
        )
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    try:
        model: nn.Module = _torchvision().models.get_model(name, weights=None, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"model.backbone = {name!r} does not take images of {image_size} px: {error}"
        ) from error
    return model


def _last_linear(name: str, body: nn.Module) -> tuple[str, nn.Linear]:
    """Return the classifier, which is the network's last linear layer, with its dotted path."""
    linears = [(path, module) for path, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ConfigError(
            f"model.backbone = {name!r} has no linear classifier to remove; choose another model"
        )
    return linears[-1]


def _replace_batch_norm(body: nn.Module, norm: Norm) -> None:
    found = [(path, module) for path, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for path, batch_norm in found:
        body.set_submodule(path, _frozen(batch_norm) if norm is Norm.FROZEN_BATCH else _grouped(batch_norm))


def _grouped(batch_norm: nn.BatchNorm2d) -> nn.GroupNorm:
    """Return a GroupNorm (Wu & He 2018) with the BatchNorm's affine weights.

    The running statistics are dropped. The groups are the largest divisor of the channels up to 32 that
    leaves two channels in a group.
    """
    channels = batch_norm.num_features
    # A group of one channel would erase that channel's mean, and everything where the map is one pixel.
    divisors = [n for n in range(1, _MAX_GROUPS + 1) if channels % n == 0 and channels // n >= 2]
    group_norm = nn.GroupNorm(max(divisors, default=1), channels, eps=batch_norm.eps)
    group_norm.load_state_dict({"weight": batch_norm.weight, "bias": batch_norm.bias})
    return group_norm


def _frozen(batch_norm: nn.BatchNorm2d) -> nn.Module:
    """Return a layer with the BatchNorm's affine map and statistics as constants."""
    frozen: nn.Module = _torchvision().ops.FrozenBatchNorm2d(batch_norm.num_features, eps=batch_norm.eps)
    state = batch_norm.state_dict()
    del state["num_batches_tracked"]
    frozen.load_state_dict(state)
    return frozen


def _load_weights(body: nn.Module, path: Path, classifier: str) -> tuple[str, ...]:
    """Load a state dict and return the names in it that belong to the removed classifier.

    The classifier is not loaded and may differ in shape.
    """
    require_file(path, "the weights file", "Give a local .safetensors or .pth file as model.weights.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # A full unpickling could run code that the file brings.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"the weights file {path} cannot be read: {type(error).__name__}\n"
            "Give a state dict saved by safetensors or by torch.save (tensors only)."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"the weights file {path} is not a flat state dict of tensors\nSave model.state_dict()."
        )
    own = body.state_dict()
    removed = tuple(sorted(key for key in state if classifier and key.startswith(f"{classifier}.")))
    expected = {key for key in own if not (classifier and key.startswith(f"{classifier}."))}
    # Files of old torch versions, and files without BatchNorm, do not count batches; nothing here does.
    expected -= {key for key in expected if key.endswith("num_batches_tracked") and key not in state}
    given = set(state) - set(removed)
    faults = [f"missing: {key}" for key in sorted(expected - given)]
    faults += [f"unknown: {key}" for key in sorted(given - set(own))]
    faults += [
        f"shape of {key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(given & expected)
        if state[key].shape != own[key].shape
    ]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:10])
        more = f"\n  ... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(
            f"the weights file {path} is not of this backbone:\n{shown}{more}\n"
            "Set model.backbone to the model that the file was saved from."
        )
    body.load_state_dict({key: state[key] for key in given}, strict=False)
    return removed


def _side(output: Tensor) -> int:
    """Return H of a square map with channels first or last, or 0 where the tensor is no square map."""
    _, a, b, c = output.shape
    if b == c:
        return b
    return a if a == b else 0


def _channels_first(map: Tensor) -> Tensor:
    return map if map.shape[2] == map.shape[3] else map.permute(0, 3, 1, 2)
