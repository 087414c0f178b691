"""Build networks that map images to features, from torchvision or our own.

The classifier is removed, BatchNorm replaced, in-place activations made out of place. A named model keeps
its official stem at every image size: a name means the published architecture, with or without its weights,
and 'resnet-small' is there for small images. This module knows nothing of label trees or bags.

Define a small GroupNorm ResNet for images of 32 to 96 pixels on CPUs.

It knows nothing of heads or label trees.

0.31 M parameters, sized by images per second of a training step on one CPU thread (measured: 3100 at 32 px,
1700 at 48 px, batches of 64). The first convolution halves the image: at full resolution the same network
is four times slower. Starting at 32 channels instead of 16 halves the speed; GroupNorm costs a third of the
step, and channels-last memory gains under 5 %, so plain contiguous tensors stay.

Map images to fixed features that count colours in the centre and around it.

Nothing in it is learned, so it costs no privacy and takes no noise: with little private data, linear heads
on fixed features beat networks that are trained end to end (Tramer & Boneh 2021). It is meant for images
whose classes differ in colour and whose object lies in the centre, such as stained cells. It is blind to
shapes, and knows nothing of heads or label trees.
"""

import difflib
import pickle
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from common.config_tables import Norm
from common.errors import ConfigError, UserError, require_file

WIDTHS = (16, 32, 64, 128)
GROUPS = 8


class ResidualBlock(nn.Module):
    """Add a shortcut to two 3x3 convolutions with GroupNorm (He et al. 2016).

    The sum is out of place so that per-example gradient hooks see every activation unchanged.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        # Out of place, so that per-example gradient hooks see every activation unchanged.
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Map images (N, 3, S, S), S >= 16, to features (N, 128)."""

    n_features = WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, WIDTHS[0])
        blocks = [ResidualBlock(WIDTHS[0], WIDTHS[0], stride=1)]
        blocks += [ResidualBlock(a, b, stride=2) for a, b in pairwise(WIDTHS)]
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features of the images."""
        x: Tensor = self.blocks(F.relu(self.norm(self.stem(images))))
        return x.mean(dim=(2, 3))


BINS = 4
"""Along each of red, green and blue: 64 colours."""
RINGS = 2
"""Pixels nearer to the centre than half the way to an edge, and the rest."""


class ColourHistogram(nn.Module):
    """Map images (N, 3, S, S) in [-1, 1] to features (N, 128) whose mean square is 1.

    Per ring a joint histogram of the three colours, bins filled linearly so that a small change of light
    is a small change of the feature. Square roots make distances those of Hellinger, in which rare
    colours count too, and make the length the same for every image.
    """

    n_features = RINGS * BINS**3

    def __init__(self, image_size: int) -> None:
        super().__init__()
        axis = (torch.arange(image_size) + 0.5) * (2 / image_size) - 1
        outer = (axis[:, None].square() + axis.square()).flatten().sqrt() >= 1 / RINGS
        members = torch.stack([~outer, outer]).float()
        # Tables that the architecture fixes, like the index tables of the label tree: not in its files.
        self.register_buffer("rings", members / members.sum(dim=1, keepdim=True), persistent=False)
        self.register_buffer("centres", torch.linspace(-1, 1, BINS), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the images."""
        distance = (images.clamp(-1, 1).flatten(2).unsqueeze(2) - self.get_buffer("centres")[:, None]).abs()
        red, green, blue = (1 - distance * (BINS - 1) / 2).clamp_min(0).unbind(1)
        # (N, BINS, P) each; the share of a colour in a ring is a mean over pixels of the product.
        pairs = (red[:, :, None] * green[:, None]).flatten(1, 2)
        weighted = torch.einsum("nbp,rp->nrbp", blue, self.get_buffer("rings"))
        shares = torch.einsum("nap,nrbp->nrab", pairs, weighted)
        return (shares * BINS**3).clamp_min(0).sqrt().flatten(1)


SMALL = "resnet-small"
COLOURS = "colour-histogram"
"""Nothing to train: for private runs, see common/model/backbones.py."""
MAX_GROUPS = 32


class Backbone(nn.Module):
    """Wrap a network without its classifier.

    Attributes:
        body: the network; maps (N, 3, S, S) to (N, n_features).
        n_features: length of the pooled feature.
        ignored_weights: names in the weights file that belong to the removed classifier.
    """

    def __init__(self, body: nn.Module, n_features: int, ignored_weights: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.body = body
        self.n_features = n_features
        self.ignored_weights = ignored_weights

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, n_features) of images (N, 3, S, S)."""
        features: Tensor = self.body(images)
        return features


def backbone_names() -> list[str]:
    """Return every name that ``build_backbone`` knows."""
    return [SMALL, COLOURS, *torchvision.models.list_models(module=torchvision.models)]


def build_backbone(name: str, norm: Norm, weights: Path | None, image_size: int) -> Backbone:
    """Build a backbone with given weights, or random ones from torch's global generator.

    Args:
        name: 'resnet-small', 'colour-histogram' or a torchvision classification model (see
            backbone_names).
        norm: what replaces BatchNorm. FROZEN_BATCH without weights freezes mean 0 and variance 1, a
            placeholder for statistics that are loaded later; build_model refuses it.
        weights: state dict of the named model in torchvision's own names (.safetensors, or .pth read
            with ``weights_only``), or None for random weights.
        image_size: side of the square input in pixels.

    Raises:
        ConfigError: unknown name, or a model without a linear classifier or that cannot take this size.
        UserError: the weights file is missing, unreadable, or of another model.
    """
    if name == SMALL:
        body: nn.Module = SmallResNet()
        if weights is not None:
            _load_weights(body, weights, classifier="")
        return Backbone(body, SmallResNet.n_features)
    if name == COLOURS:
        if weights is not None:
            raise ConfigError(f"model.backbone = {COLOURS!r} has no weights: leave model.weights empty")
        return Backbone(ColourHistogram(image_size), ColourHistogram.n_features)
    body = _torchvision_model(name, image_size)
    path, classifier = _last_linear(name, body)
    ignored = _load_weights(body, weights, classifier=path) if weights is not None else ()
    body.set_submodule(path, nn.Identity())
    _replace_batch_norm(body, norm)
    for module in body.modules():
        # Per-example gradient hooks need every activation as it was, and an in-place layer overwrites it.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    backbone = Backbone(body, classifier.in_features, ignored)
    _check_by_running(name, backbone, image_size)
    return backbone


def _torchvision_model(name: str, image_size: int) -> nn.Module:
    known = backbone_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(
            f"model.backbone = {name!r} is neither {SMALL!r} nor a torchvision classification model{hint}"
        )
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
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
    divisors = [n for n in range(1, MAX_GROUPS + 1) if channels % n == 0 and channels // n >= 2]
    group_norm = nn.GroupNorm(max(divisors, default=1), channels, eps=batch_norm.eps)
    group_norm.load_state_dict({"weight": batch_norm.weight, "bias": batch_norm.bias})
    return group_norm


def _frozen(batch_norm: nn.BatchNorm2d) -> nn.Module:
    """Return a layer with the BatchNorm's affine map and statistics as constants."""
    frozen: nn.Module = FrozenBatchNorm2d(batch_norm.num_features, eps=batch_norm.eps)
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


@torch.no_grad()
def _check_by_running(name: str, backbone: Backbone, image_size: int) -> None:
    """Run two blank images through the backbone and refuse it if that fails.

    Some models want larger images or return auxiliary outputs in training.
    """
    try:
        features = backbone(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.backbone = {name!r} does not take images of {image_size} px: {error}\n"
            "Raise model.image-size, or choose another model."
        ) from error
    if not isinstance(features, Tensor) or features.shape != (2, backbone.n_features):
        raise ConfigError(
            f"model.backbone = {name!r} does not give one pooled feature per image; choose another"
        )
