"""Read a scenario file, which selects the methods, data, bag sizes, seeds and settings to compare.

The module holds only what the file may contain and the errors for everything else. cells.py expands it.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from common.config import RunConfig, Scalar, flatten
from common.errors import ConfigError, require_file
from common.model.methods import Method
from common.settings_file import Section, nearest, read_toml
from deploy.datasets.options import SourceKind

_Count = Annotated[int, Field(strict=True, ge=1)]
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]

_OWN_KEYS = ("name", "seed", "rounds", "run-dir", "sites-dir", "resume", "model.method", "federation.sites")
"""Keys of the run configuration that each cell sets for itself."""


class Setting(StrEnum):
    """Name whose images one model is trained on."""

    POOLED = "pooled"
    """All of them, at one site."""
    LOCAL_ONLY = "local-only"
    """Those of one site; a model for each."""
    FEDERATED = "federated"
    """All of them, each at its site."""


class _Overrides(Section):
    set: dict[str, Scalar] = Field({}, description="keys of the run configuration, nested or dotted")

    @field_validator("set", mode="before")
    @classmethod
    def _flat(cls, value: object) -> object:
        return check_settings(value)


class Data(Section):
    """Describe the source of images and labels, and their division into sites and bags."""

    source: SourceKind
    path: str = Field(
        "", description="folder of images, root of the data set, or .npz; from the file's folder"
    )
    labels: str = Field("", description="label table (table, dicom)")
    hierarchy: str = Field("", description="label tree as CSV (table, dicom, medmnist)")
    label_column: str | None = None
    split_column: str | None = Field(None, description="rows that it calls test are for tests")
    group_column: str | None = Field(None, description="a group is never divided over sites or the split")
    test_share: float | None = Field(
        None, gt=0, lt=1, description="share of the images that become test images, where there is no split"
    )
    limit: _Count | None = Field(None, description="at most this many training images, and test images alike")
    bags: str = Field("random", description="random, similarity or column:NAME")
    groups: Annotated[str, Field(pattern="^(bags|sites)$")] = "bags"
    partition: str = Field("dirichlet:0.5", description="iid, dirichlet:ALPHA or column:NAME")
    sites: _Count = 5
    levels: tuple[str, ...] | None = Field(None, description="names of the levels, instead of the source's")
    skip_bad: bool = Field(False, description="leave out what cannot be read")
    images_per_site: _Count = Field(1200, description="synthetic only")
    image_size: Annotated[int, Field(strict=True, ge=16, le=1024)] = Field(48, description="synthetic only")
    origin: str = Field("", description="where to get the data; told when they are missing")


class Grid(_Overrides):
    """Select a part of one setting's cells.

    What is not given is taken from the top of the file.
    """

    methods: tuple[str, ...] | None = None
    bag_sizes: tuple[_Count, ...] | None = None
    seeds: tuple[_Seed, ...] | None = None
    passes: _Count | None = None


class Entry(_Overrides):
    """Describe one row of the table, which is a method with its own settings."""

    name: _Name
    method: Method
    settings: tuple[Setting, ...] | None = None
    bag_sizes: tuple[_Count, ...] | None = None
    seeds: tuple[_Seed, ...] | None = None
    passes: _Count | None = None


class Scenario(Section):
    """Hold the content of a scenario file."""

    title: str = ""
    bag_sizes: tuple[_Count, ...] = Field(min_length=1)
    seeds: tuple[_Seed, ...] = Field(min_length=1)
    passes: _Count = Field(description="times that every training image is seen")
    images_per_step: _Count = Field(64, description="images of an optimiser step, at every bag size")
    data: Data
    run: dict[str, Scalar] = Field({}, description="keys of the run configuration, for all cells")
    settings: dict[Setting, tuple[Grid, ...]] = Field({Setting.POOLED: (Grid(),)}, min_length=1)
    methods: tuple[Entry, ...] = Field(min_length=1)

    @field_validator("run", mode="before")
    @classmethod
    def _flat(cls, value: object) -> object:
        return check_settings(value)

    @field_validator("settings", mode="before")
    @classmethod
    def _one_or_several_grids(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {key: grids if isinstance(grids, list | tuple) else (grids,) for key, grids in value.items()}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [entry.name for entry in self.methods]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {name!r} stands at {names.count(name)} [[methods]]; make it unique")
        for setting, grids in self.settings.items():
            for grid in grids:
                for name in grid.methods or ():
                    if name not in names:
                        raise ValueError(
                            f"settings.{setting.value}.methods names {name!r}, which is no [[methods]] entry"
                            + nearest(name, names)
                        )
        for name, sizes in self._sizes():
            for size in sizes:
                if self.images_per_step % size:
                    raise ValueError(
                        f"{name}: images-per-step = {self.images_per_step} is no multiple of bag size "
                        f"{size}: a step takes whole bags"
                    )
        return self

    def _sizes(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "bag-sizes", self.bag_sizes
        for setting, grids in self.settings.items():
            for grid in grids:
                yield f"settings.{setting.value}.bag-sizes", grid.bag_sizes or ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a scenario file, whose relative paths start at its own folder.

        Raises:
            UserError: no such file.
            ConfigError: it is not TOML, or says something that a scenario cannot; all faults are listed.
        """
        require_file(path, "the scenario", "docs/compare.md says how to write one; benchmarks/ has examples.")
        content = read_toml(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            # To pydantic a list whose items are all faulty is empty as well. Only the items' faults matter.
            faults = [fault for fault in error.errors() if fault["type"] != "too_short" or not fault["input"]]
            lines = "\n".join(f"  {_fault(fault, content)}" for fault in faults)
            raise ConfigError(
                f"the scenario {path} is faulty:\n{lines}\ndocs/compare.md lists the keys."
            ) from error


def check_settings(value: object) -> object:
    """Return flat keys of the run configuration, after refusing those that each cell sets for itself.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a key that the comparison sets itself.
    """
    if not isinstance(value, Mapping):
        return value
    flat, known = flatten(value), RunConfig().to_flat()
    for key in flat:
        if key in _OWN_KEYS:
            raise ValueError(f"{key} is set by the comparison itself; leave it out")
        # A pass is undefined where steps draw their bags by chance, and a comparison counts training in
        # passes.
        if key == "dp.epsilon":
            raise ValueError(
                "dp.epsilon: comparisons count passes over the images, and private training draws bags by "
                "chance; compare private runs with `fedbags simulate` and `fedbags runs`"
            )
        if key not in known:
            raise ValueError(f"unknown key {key!r}{nearest(key, known)} (`fedbags config` lists them)")
    return flat


def _fault(fault: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return one validation fault in the terms of the file."""
    place, kind = [part for part in fault["loc"] if part != "[key]"], fault["type"]
    where = _where(place, content)
    if kind == "extra_forbidden":
        near = nearest(str(place[-1]), _known_keys(place[:-1]))
        return f"{_where(place[:-1], content)}: unknown key {str(place[-1])!r}{near}"
    if kind == "missing":
        return f"{_where(place[:-1], content)}: the key {str(place[-1])!r} is missing"
    said = str(fault["msg"]).removeprefix("Value error, ")
    given = fault["input"]
    if isinstance(given, Mapping) or not place:
        return f"{where}: {said}" if place else said
    return f"{where} = {given!r}: {said}"


def _where(place: Sequence[str | int], content: Mapping[str, Any]) -> str:
    """Return the place of a fault in the file, such as ``settings.pooled`` or ``[[methods]] 2 (dllp)``."""
    if not place:
        return "at the top"
    if place[0] == "methods" and len(place) > 1:
        entries = content.get("methods")
        number = int(place[1])
        entry = entries[number] if isinstance(entries, list) and number < len(entries) else {}
        name = entry.get("name", "without name") if isinstance(entry, Mapping) else "no table"
        return " ".join([f"[[methods]] {number + 1} ({name})", ".".join(map(str, place[2:]))]).strip()
    # A single table [settings.NAME] was wrapped in a tuple; its index 0 is not in the file.
    single = len(place) > 2 and place[0] == "settings" and not isinstance(content["settings"][place[1]], list)
    return ".".join(str(part) for number, part in enumerate(place) if not (single and number == 2))


def _known_keys(place: Sequence[str | int]) -> list[str]:
    """Return the keys of the table at this place."""
    model: type[BaseModel] = Scenario
    if place:
        tables: dict[str | int, type[BaseModel]] = {"data": Data, "settings": Grid, "methods": Entry}
        model = tables.get(place[0], Scenario)
    return [field.alias or name for name, field in model.model_fields.items()]
