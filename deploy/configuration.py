"""Compose the configuration of a run from a file, presets, options and ``--set``, and list its keys.

A preset is a file of ``common/presets`` with settings that suit one way to train, each with its reason as the
comment at its line. ``--sites-dir`` and ``--dp`` bring the presets of their names along.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, get_args

from PIL import Image
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table

import common.config
from client.site import site_folders
from common.config import RunConfig, Scalar, flatten, parse_setting
from common.errors import UserError
from common.model.methods import NO_BLOCK, method_file, method_names
from common.parts import Kind, discover, names, settings_of
from deploy.cli.terminal import console

_PRESETS = Path(common.config.__file__).parent / "presets"
_IMPLIED_BY = {"sites-dir": "sites-dir", "dp.epsilon": "dp"}
"""The preset that a given key brings along; the later one wins."""
_IMAGE_SIZE = "model.image-size"
_LARGEST_IMAGE_SIZE = 224


@dataclass(frozen=True)
class RunRequest:
    """Hold what a user asks of one run."""

    options: Mapping[str, Scalar] = field(default_factory=dict)
    """Flat configuration keys that were given as options of a command."""
    settings: Sequence[str] = ()
    """``KEY=VALUE`` texts; they win."""
    config_file: Path | None = None
    """A config.toml to start from; then only presets that are named count."""
    presets: Sequence[str] = ()
    """Names of presets, beside those that ``options`` bring along."""
    out: Path | None = None
    """The run folder; one called after the run and the time if None."""
    resume: bool = False
    """Go on with the run in ``out``."""

    @property
    def given(self) -> dict[str, Scalar]:
        """Return the keys that were given, as options or as texts."""
        return {**self.options, **dict(parse_setting(text) for text in self.settings)}

    def with_its_configuration(self) -> Self:
        """Return the request with the settings that its run began with, if it goes on with one.

        Raises:
            UserError: nobody says which run.
        """
        if not self.resume:
            return self
        if self.out is None:
            raise UserError("--resume needs the run folder: give it with --out")
        file = self.out / "config.toml"
        return replace(self, config_file=file) if self.config_file is None and file.exists() else self


def compose(request: RunRequest) -> RunConfig:
    """Compose the configuration of a run from the file or the defaults, presets, options and settings.

    Each wins over those before it.

    Raises:
        UserError: an unknown key, a value out of bounds, or no such preset.
    """
    discover()
    base = RunConfig.from_toml(request.config_file) if request.config_file else RunConfig()
    given = request.given
    names, suited = _presets_in_use(request), dict[str, Scalar]()
    for name in names:
        suited |= preset_values(name)
    # A wrong key is named before any image is opened.
    config = base.with_changes({**suited, **given})
    if "sites-dir" in names and "sites-dir" in given and _IMAGE_SIZE not in given:
        size = _usual_image_size(Path(str(given["sites-dir"])))
        return base.with_changes({**suited, _IMAGE_SIZE: size, **given})
    return config


def say_presets(config: RunConfig, request: RunRequest) -> None:
    """Print on standard error which settings a run has because of its presets.

    ``config`` is what ``compose`` made of the request.
    """
    given = request.given
    flat = config.to_flat()
    for name in _presets_in_use(request):
        taken = [
            f"{row['key']}={flat[row['key']]}"
            for row in preset_rows(name)
            if row["key"] not in given and flat[row["key"]] != row["default"]
        ]
        source = f"--preset {name}" if name in request.presets else f"--{name} also"
        console(stderr=True).print(f"{source} sets {', '.join(taken)} (`fedbags config --preset {name}`)")


def preset_rows(name: str) -> list[dict[str, Any]]:
    """Return every setting of a preset as rows of ``{key, default, preset, why}``.

    Raises:
        UserError: there is no such preset.
    """
    own = sorted(path.stem for path in _PRESETS.glob("*.toml"))
    if name not in [*own, *method_names()]:
        raise UserError(f"no preset {name!r}: there are {', '.join([*own, *method_names()])}")
    usual = RunConfig().to_flat()
    rows = []
    file = _PRESETS / f"{name}.toml" if name in own else method_file(name)
    for line in file.read_text(encoding="utf-8").splitlines():
        setting, _, why = line.partition("  # ")
        rows += [
            {"key": key, "default": usual[key], "preset": value, "why": why}
            for key, value in flatten(tomllib.loads(setting)).items()
        ]
    if name == "sites-dir":
        why = f"the usual shorter side of the sites' images, at most {_LARGEST_IMAGE_SIZE}"
        rows.append(
            {"key": _IMAGE_SIZE, "default": usual[_IMAGE_SIZE], "preset": "from the images", "why": why}
        )
    return rows


def preset_values(name: str) -> dict[str, Scalar]:
    """Return the settings of a preset by key, as far as they do not depend on the images.

    Raises:
        UserError: there is no such preset.
    """
    if name in method_names():
        # A method says what is left empty, so the configuration names it and stays open for single parts.
        return {"model.method": name}
    return {row["key"]: row["preset"] for row in preset_rows(name) if row["key"] != _IMAGE_SIZE}


def config_rows(part: str | None = None) -> list[dict[str, Any]]:
    """Return a row ``{key, default, bounds, meaning}`` for every configuration key, or for those of a part.

    Raises:
        UserError: no part of this name has settings.
    """
    discover()
    if part is not None:
        return list(_rows(settings_of(part)(), f"parts.{part}."))
    known = {
        "model.method": method_names(),
        "model.block": [NO_BLOCK, *names(Kind.BLOCK)],
        "model.head": names(Kind.HEAD),
        "model.terms": names(Kind.TERM),
        "federation.strategy": names(Kind.STRATEGY),
    }
    return [
        {**row, "bounds": " | ".join(known.get(row["key"], [])) or row["bounds"]}
        for row in _rows(RunConfig(), "")
    ]


def _rows(section: BaseModel, prefix: str) -> Iterator[dict[str, Any]]:
    for name, known in type(section).model_fields.items():
        key, value = f"{prefix}{known.alias or name}", getattr(section, name)
        if isinstance(value, Mapping):
            continue  # the tables of parts, which ``config_rows`` lists by the part's name
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{key}.")
        else:
            bounds = ", ".join(
                f"{symbol} {limit}"
                for constraint in known.metadata
                for attribute, symbol in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
                if (limit := getattr(constraint, attribute, None)) is not None
            )
            kind = known.annotation
            if isinstance(kind, type) and issubclass(kind, StrEnum):
                choices = " | ".join(kind)
            else:
                choices = " | ".join(get_args(kind))
            yield {
                "key": key,
                "default": value,
                "bounds": bounds or choices,
                "meaning": known.description or "",
            }


def print_config(rows: list[dict[str, Any]]) -> None:
    """Print the keys with their defaults, bounds and meaning."""
    keys = _key_table("run configuration", "default", "bounds", "meaning")
    for row in rows:
        keys.add_row(row["key"], str(row["default"]), row["bounds"], row["meaning"])
    console().print(keys)


def print_preset(rows: list[dict[str, Any]], option: str) -> None:
    """Print the settings that an option brings with it."""
    brought_by = f"--method {option}" if option in method_names() else f"--{option}"
    keys = _key_table(f"what {brought_by} also sets, unless you do", "default", option, "why")
    for row in rows:
        keys.add_row(row["key"], str(row["default"]), str(row["preset"]), row["why"])
    console().print(keys)


def _key_table(title: str, *columns: str) -> Table:
    """Return an empty table of keys, which are never wrapped, so that they can be copied."""
    result = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    result.add_column("key", no_wrap=True)
    for name in columns:
        result.add_column(name, overflow="fold")
    return result


def parse_dp(text: str | None) -> dict[str, Scalar]:
    """Return ``epsilon=8[,delta=1e-4]`` as configuration keys, or none for None.

    Raises:
        UserError: another key, or no epsilon above 0.
    """
    if text is None:
        return {}
    keys = dict(parse_setting(part) for part in text.split(","))
    epsilon = keys.get("epsilon")
    unknown = keys.keys() - {"epsilon", "delta"}
    if unknown or not isinstance(epsilon, int | float) or epsilon <= 0:
        raise UserError(
            f"--dp {text}: write epsilon=E or epsilon=E,delta=D with E above 0, such as epsilon=8"
        )
    return {f"dp.{key}": value for key, value in keys.items()}


def _presets_in_use(request: RunRequest) -> Sequence[str]:
    """Return the names of the presets that count, where the later one wins."""
    given = request.given
    implied = [preset for key, preset in _IMPLIED_BY.items() if given.get(key)]
    return list(dict.fromkeys([*([] if request.config_file else implied), *request.presets]))


def _usual_image_size(sites_dir: Path) -> int:
    """Return the median shorter side of some of the sites' images, at least 8 and at most 224 pixels."""
    sides = []
    for site in site_folders(sites_dir):
        for path in sorted((site / "images").glob("*"))[:20]:
            try:
                with Image.open(path) as image:
                    sides.append(min(image.size))
            except OSError:
                # The full check of every image follows, and names the row of a bad one.
                continue
    if not sides:
        return int(RunConfig().model.image_size)
    return max(8, min(sorted(sides)[len(sides) // 2], _LARGEST_IMAGE_SIZE))
