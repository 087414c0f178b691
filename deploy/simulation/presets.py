"""List the settings that ``--sites-dir`` and ``--dp`` bring with them, each with its reason.

A key that the user gives wins, and a run that starts from a configuration file takes nothing from here.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

Scalar = str | int | float | bool


class Preset(StrEnum):
    """Name the options of ``fedbags simulate`` that bring settings with them."""

    DP = "dp"
    SITES_DIR = "sites-dir"


FROM_IMAGES = "from the images"

PRESETS: Mapping[Preset, Mapping[str, tuple[Scalar, str]]] = {
    Preset.SITES_DIR: {
        "rounds": (120, "the built-in default is sized for the two-minute demo"),
        "evaluation.every": (4, "a look at held-back bags in every round would cost time"),
        "train.bags-per-step": (4, "smoother steps, for more images than the demo has"),
        "model.image-size": (FROM_IMAGES, "the usual shorter side of the sites' images, at most 224"),
    },
    # Few trained parameters on fixed features: docs/privacy.md has the figures that these were chosen by.
    Preset.DP: {
        "rounds": (20, "the budget is divided among the rounds"),
        "model.backbone": ("colour-histogram", "fixed features: noise grows with what is trained"),
        "model.atoms-per-class": (1, "fewer parameters, less noise"),
        "model.tied": (False, "the head is trained by itself on fixed features"),
        "loss.refinement": (0.0, "it needs features that are trained"),
        "train.part": ("head", "fewer parameters, less noise"),
        "train.optimiser": ("sgd", "adaptive steps follow the noise"),
        "train.learning-rate": (0.375, "for SGD on clipped gradients"),
        "train.augmentation": ("none", "fixed features are computed from the images as they are"),
        "train.held-back": (0.0, "no figure of a held-back bag may leave, so all bags train"),
        "loss.coarse-weight": (3.0, "coarse levels have the larger counts and stand the noise"),
        "loss.anneal-from": (3.0, "as loss.coarse-weight, from the first round on"),
        "dp.clip-norm": (1.0, "the usual norm of a bag's gradient of the head"),
        "dp.expected-bags": (40.0, "more bags in a step, less noise for each"),
        "dp.steps-per-round": (20, "few rounds of many steps: less is sent, and the noise is the same"),
    },
}


def values(preset: Preset) -> dict[str, Scalar]:
    """Return the settings of a preset by key, without those that depend on the images."""
    return {key: value for key, (value, _) in PRESETS[preset].items() if value != FROM_IMAGES}


def preset_rows(preset: Preset) -> list[dict[str, Any]]:
    """Return every setting of a preset as rows of ``{key, default, preset, why}``."""
    # Brings pydantic along, for which --help need not wait.
    from common.config import RunConfig

    usual = RunConfig().to_flat()
    return [
        {"key": key, "default": usual[key], "preset": value, "why": why}
        for key, (value, why) in PRESETS[preset].items()
    ]
