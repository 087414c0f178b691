"""Read and write a trained model as files, and its values as named arrays.

The files are model.safetensors and model.json. This module knows nothing of training, of sites, or of how
arrays travel.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.config_tables import ModelConfig
from common.errors import DataError, UserError, require_file
from common.files import replacing
from common.hierarchy import Hierarchy
from common.model.build import Settings, rebuild_model
from common.model.classifier import HierarchicalClassifier
from common.parts import settings_of
from common.settings_file import validated

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"

Arrays = dict[str, NDArray[np.float32]]


class Preprocessing(BaseModel):
    """Describe the steps from an image to the model's input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(ge=8, le=1024, description="side of the square input, pixels")
    resize: Literal["shorter side, centre crop"] = "shorter side, centre crop"
    colours: Literal["RGB"] = "RGB"
    scale: Literal["x/127.5-1"] = "x/127.5-1"


class ModelCard(BaseModel):
    """Hold the content of model.json, which is all that is needed to use the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelConfig
    parts: dict[str, dict[str, str | int | float | bool]] = Field(
        {}, description="settings of its parts, one table each"
    )
    hierarchy: dict[str, Any] = Field(description="Hierarchy.to_dict()")
    preprocessing: Preprocessing
    versions: dict[str, str]
    round: int = Field(ge=0, description="rounds the weights have seen")
    weights_sha256: str = Field("", description="of model.safetensors; filled in by save_model")

    @classmethod
    def describe(
        cls, model: ModelConfig, hierarchy: Hierarchy, round: int, settings: Settings | None = None
    ) -> Self:
        """Return the card of a model built from ``model`` and the settings of its parts."""
        tables = {
            name: table.model_dump(mode="json", by_alias=True) for name, table in (settings or {}).items()
        }
        return cls(
            # The path of the weights file stays on this machine: the card is copied along with the model.
            model=model.model_copy(update={"weights": ""}),
            parts=tables,
            hierarchy=hierarchy.to_dict(),
            preprocessing=Preprocessing(image_size=model.image_size),
            versions={name: version(name) for name in ("fedbags", "torch", "torchvision")},
            round=round,
        )


def save_model(directory: Path, model: HierarchicalClassifier, card: ModelCard) -> None:
    """Write model.safetensors and model.json into ``directory``, which is created.

    Both are complete on disk before either takes its name, so a crash or a full disk leaves the old pair;
    a crash between the two renames leaves a pair whose digests differ, which load_model reports.

    Raises:
        UserError: the folder or a file cannot be written.
    """
    weights = save({name: value.detach().cpu().contiguous() for name, value in _values(model).items()})
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    contents = {
        WEIGHTS_FILE: weights,
        CARD_FILE: (card.model_dump_json(indent=2, by_alias=True) + "\n").encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(*(directory / name for name in contents)) as temporary:
            for path, content in zip(temporary, contents.values(), strict=True):
                path.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"the model cannot be written to {directory}: {error.strerror}\n"
            "Choose a folder that can be written to, with enough free space."
        ) from error


def load_model(directory: Path) -> tuple[HierarchicalClassifier, ModelCard]:
    """Read a model that ``save_model`` wrote, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    advice = "Give a folder with model.safetensors and model.json, such as a run folder."
    card_path = require_file(directory / CARD_FILE, "the model's card", advice)
    weights_path = require_file(directory / WEIGHTS_FILE, "the model's weights", advice)
    try:
        card = ModelCard.model_validate_json(card_path.read_bytes())
        hierarchy = Hierarchy.from_dict(card.hierarchy)
    except (ValidationError, DataError, KeyError, TypeError) as error:
        raise UserError(
            f"{card_path} is not a model card of this version of fedbags: {error}\n{advice}"
        ) from error
    content = weights_path.read_bytes()
    # A crash between the two renames, or a copy of only one file, leaves weights that another card
    # describes.
    if card.weights_sha256 != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{weights_path} is damaged, or belongs to another {CARD_FILE}: its SHA-256 is not the card's\n"
            "Copy both files again from the run that wrote them."
        )
    settings = {name: validated(settings_of(name), table, card_path) for name, table in card.parts.items()}
    model = rebuild_model(card.model, hierarchy, settings)
    try:
        _assign(model, load(content), _values(model))
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{weights_path} does not fit the model that {card_path} describes: {error}"
        ) from error
    return model.eval(), card


def trainable_arrays(model: HierarchicalClassifier) -> Arrays:
    """Return copies of the parameters that training changes, by name.

    These are the arrays that a site sends.
    """
    return {name: _to_numpy(value) for name, value in _trainable(model).items()}


def all_arrays(model: HierarchicalClassifier) -> Arrays:
    """Return copies of every floating parameter and buffer, frozen ones included."""
    return {name: _to_numpy(value) for name, value in _values(model).items()}


def load_arrays(model: HierarchicalClassifier, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy arrays into the model.

    They must be exactly those of ``trainable_arrays`` or exactly those of ``all_arrays``.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype differs. Nothing is changed then, and
            the text holds names, shapes and dtypes only.
    """
    expected = _trainable(model)
    # A site sends the trainable arrays only; the server and the model file hold all of them.
    if set(arrays) != set(expected) and set(arrays) == set(_values(model)):
        expected = _values(model)
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ValueError(f"array {name!r} has dtype {array.dtype} instead of float32")
    _assign(model, {name: torch.tensor(array) for name, array in arrays.items()}, expected)


def _trainable(model: HierarchicalClassifier) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _values(model: HierarchicalClassifier) -> dict[str, Tensor]:
    """Return the floating entries of the state dict.

    Integer buffers are left out because they are tables that the architecture fixes.
    """
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _to_numpy(value: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.detach().cpu().float().numpy().copy()
    return array


def _assign(
    model: HierarchicalClassifier, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check every name and shape, then copy the values."""
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        raise ValueError(f"array names differ: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, value in given.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"array {name!r} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}"
            )
    model.load_state_dict(dict(given), strict=False)
