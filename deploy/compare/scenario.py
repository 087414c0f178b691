"""Read a scenario file, and expand it into its cells, one for each model that is trained and scored.

A scenario selects the methods, data, bag sizes, seeds and settings to compare. There is one cell for each
method, bag size, seed and setting, and in the local-only setting one for each site. The module is pure: it
turns a file into names and run configurations, names all faults, and opens no data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from common.config import RunConfig, Scalar, flatten, refuse_unknown_key
from common.errors import ConfigError, require_file
from common.model.methods import method_names, sees_labels
from common.parts import Kind, discover, names
from common.settings_file import Section, nearest, read_toml
from deploy.datasets.options import Division, SourceKind

_Count = Annotated[int, Field(strict=True, ge=1)]
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]

_OWN_KEYS = ("name", "seed", "rounds", "run-dir", "sites-dir", "resume", "model.method", "federation.sites")
"""Keys of the run configuration that each cell sets for itself."""
WEIGHTS = "model.weights"
"""The one key of the run configuration that names a file."""
_SMALLEST_BAG = 4
"""Images: the policy of the site folders, where bags are larger than that."""


class Setting(StrEnum):
    """Name whose images one model is trained on."""

    POOLED = "pooled"
    """All of them, at one site."""
    LOCAL_ONLY = "local-only"
    """Those of one site; a model for each."""
    FEDERATED = "federated"
    """All of them, each at its site."""


def check_settings(value: object) -> object:
    """Return flat keys of the run configuration, after refusing those that each cell sets for itself.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a key that the comparison sets itself.
    """
    if not isinstance(value, Mapping):
        return value
    flat = flatten(value)
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
        try:
            refuse_unknown_key(key)
        except ConfigError as error:
            raise ValueError(f"{error} (`fedbags config` lists them)") from error
    return flat


_RunKeys = Annotated[dict[str, Scalar], BeforeValidator(check_settings)]
"""Keys of the run configuration, nested or dotted."""


class _Part(Section):
    """Change the run configuration of some cells."""

    set: _RunKeys = Field({}, description="keys of the run configuration, nested or dotted")


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


class _Grid(_Part):
    """Select a part of one setting's cells; what is not given is taken from the top of the file."""

    methods: tuple[str, ...] | None = None
    bag_sizes: tuple[_Count, ...] | None = None
    seeds: tuple[_Seed, ...] | None = None
    passes: _Count | None = None


class _Entry(_Part):
    """Describe one row of the table, which is a method with its own settings."""

    name: _Name
    method: str
    settings: tuple[Setting, ...] | None = None
    bag_sizes: tuple[_Count, ...] | None = None
    seeds: tuple[_Seed, ...] | None = None
    passes: _Count | None = None

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        names = method_names()
        if method not in names:
            raise ValueError(f"there is no such method{nearest(method, names)}; known: {', '.join(names)}")
        return method


class Scenario(Section):
    """Hold the content of a scenario file."""

    title: str = ""
    bag_sizes: tuple[_Count, ...] = Field(min_length=1)
    seeds: tuple[_Seed, ...] = Field(min_length=1)
    passes: _Count = Field(description="times that every training image is seen")
    images_per_step: _Count = Field(64, description="images of an optimiser step, at every bag size")
    probes: tuple[str, ...] = Field((), description="parts that measure every trained model besides")
    data: Data
    run: _RunKeys = Field({}, description="keys of the run configuration, for all cells")
    settings: dict[Setting, tuple[_Grid, ...]] = Field({Setting.POOLED: (_Grid(),)}, min_length=1)
    methods: tuple[_Entry, ...] = Field(min_length=1)

    @field_validator("probes")
    @classmethod
    def _are_known(cls, probes: tuple[str, ...]) -> tuple[str, ...]:
        known = names(Kind.PROBE)
        for probe in probes:
            if probe not in known:
                near = nearest(probe, known)
                raise ValueError(f"there is no probe {probe!r}{near}; known: {', '.join(known)}")
        return probes

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
        discover()
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            # To pydantic a list whose items are all faulty is empty as well. Only the items' faults matter.
            faults = [fault for fault in error.errors() if fault["type"] != "too_short" or not fault["input"]]
            lines = "\n".join(f"  {_fault(fault, content)}" for fault in faults)
            raise ConfigError(
                f"the scenario {path} is faulty:\n{lines}\ndocs/compare.md lists the keys."
            ) from error


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
        tables: dict[str | int, type[BaseModel]] = {"data": Data, "settings": _Grid, "methods": _Entry}
        model = tables.get(place[0], Scenario)
    return [field.alias or name for name, field in model.model_fields.items()]


@dataclass(frozen=True)
class Cell:
    """Describe one model to train and score."""

    name: str
    """Unique, and the name of its run folder."""
    method: str
    """The row's name in the table."""
    setting: Setting
    bag_size: int
    seed: int
    passes: int
    site: int | None
    """1-based, for a local-only cell."""
    division: Division
    config: RunConfig
    """Complete but for the places ``run-dir`` and ``sites-dir``."""
    probes: tuple[str, ...]
    """What measures the trained model besides."""


@dataclass(frozen=True)
class Context:
    """Hold the settings of the command line, which win over those of the scenario file.

    ``overrides`` are keys of the run configuration. Relative paths of the file start at ``folder``.
    """

    folder: Path = Path()
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    passes: int | None = None


def expand(scenario: Scenario, context: Context) -> list[Cell]:
    """Return every cell of a scenario, ordered by setting, bag size, seed, method and site.

    Raises:
        ConfigError: an entry without any cell, two different cells of one name, or a configuration that a
            run would refuse.
    """
    cells: dict[str, Cell] = {}
    for setting, grids in scenario.settings.items():
        for grid in grids:
            for cell in _of_grid(scenario, context, setting, grid):
                # The name is the run folder: of two different cells with one name, the second would train in
                # the folder of the first. Equal cells, which overlapping parts of a setting may describe, are
                # one cell.
                if cells.setdefault(cell.name, cell) != cell:
                    raise ConfigError(
                        f"two parts of settings.{setting.value} mean {cell.name}, with different settings: "
                        "let each name other methods, bag-sizes or seeds"
                    )
    used = {cell.method for cell in cells.values()}
    # Such an entry would be missing from the table without any message.
    if idle := [entry.name for entry in scenario.methods if entry.name not in used]:
        raise ConfigError(
            f"no cell is left for {', '.join(idle)}: settings, bag-sizes and seeds of the entry and those of "
            "[settings] have nothing in common"
        )
    return list(cells.values())


def _of_grid(scenario: Scenario, context: Context, setting: Setting, grid: _Grid) -> Iterator[Cell]:
    entries = [
        entry
        for entry in scenario.methods
        if entry.name in (grid.methods or (entry.name,)) and setting in (entry.settings or (setting,))
    ]
    for bag_size in grid.bag_sizes or scenario.bag_sizes:
        for seed in grid.seeds or scenario.seeds:
            for entry in entries:
                # Methods that see labels get bags of one image whatever the size, so their cells coincide.
                fits = sees_labels(entry.method) or bag_size in (entry.bag_sizes or (bag_size,))
                if fits and seed in (entry.seeds or (seed,)):
                    point = _Point(setting, 1 if sees_labels(entry.method) else bag_size, seed)
                    yield from _of_entry(scenario, context, grid, entry, point)


class _Point(NamedTuple):
    """Name a point of a grid."""

    setting: Setting
    bag_size: int
    seed: int


def _of_entry(
    scenario: Scenario, context: Context, grid: _Grid, entry: _Entry, point: _Point
) -> Iterator[Cell]:
    setting, bag_size, seed = point
    division = _division(scenario.data, setting, bag_size, seed)
    passes = context.passes or entry.passes or grid.passes or scenario.passes
    # A pooled or local-only model is trained at one site, whatever the division.
    sites = division.number_of_sites if setting is Setting.FEDERATED else 1
    chosen = {**scenario.run, **grid.set, **entry.set}
    if chosen.get(WEIGHTS):
        chosen[WEIGHTS] = str(context.folder / str(chosen[WEIGHTS]))
    chosen |= context.overrides
    where = f"{entry.name} at bag size {bag_size}, {setting.value}"
    if "model.image-size" not in chosen:
        raise ConfigError("say the side of the model's input in pixels: model.image-size in [run]")
    try:
        config = RunConfig().with_changes(
            {
                # Every optimiser step sees the same number of images, so bag sizes differ in nothing else.
                "train.bags-per-step": scenario.images_per_step // bag_size,
                **chosen,
                "model.method": entry.method,
                "seed": seed,
                "federation.sites": sites,
            }
        )
        # A round is local_epochs passes, or one of rounds_per_pass parts of a pass; the config allows one of
        # them.
        rounds, rest = divmod(passes * config.train.rounds_per_pass, config.train.local_epochs)
        if rest or not rounds:
            raise ConfigError(
                f"passes = {passes} is no multiple of train.local-epochs = {config.train.local_epochs}"
            )
        config = config.with_changes({"rounds": rounds})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    name = f"{entry.name}_bag{bag_size}_seed{seed}_{setting.value}"
    alone: tuple[int | None, ...] = (None,)
    if setting is Setting.LOCAL_ONLY:
        alone = tuple(range(1, division.number_of_sites + 1))
    for site in alone:
        full = name if site is None else f"{name}_site{site}"
        yield Cell(
            name=full,
            method=entry.name,
            setting=setting,
            bag_size=bag_size,
            seed=seed,
            passes=passes,
            site=site,
            division=division,
            config=config,
            probes=scenario.probes,
        )


def _division(data: Data, setting: Setting, bag_size: int, seed: int) -> Division:
    # A bag of one image cannot keep a group together, so only sites keep the groups of single images.
    pooled, single = setting is Setting.POOLED, bag_size == 1
    return Division(
        bag_size=bag_size,
        minimum_bag_size=min(_SMALLEST_BAG, bag_size),
        sites=1 if pooled else data.sites,
        partition="iid" if pooled else data.partition,
        bags="random" if single else data.bags,
        group_column=data.group_column,
        groups="sites" if single else data.groups,
        seed=seed,
    )
