"""Expand a scenario into its cells, one for each model that is trained and scored.

There is one cell for each method, bag size, seed and setting, and in the local-only setting one for each
site. The module is pure. It turns a scenario into names and run configurations and opens no data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.config import RunConfig, Scalar
from common.errors import ConfigError
from deploy.compare.scenario import Data, Entry, Grid, Scenario, Setting
from deploy.datasets.options import Division

WEIGHTS = "model.weights"
"""The one key of the run configuration that names a file."""
_SMALLEST_BAG = 4
"""Images: the policy of the site folders, where bags are larger than that."""


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


def _of_grid(scenario: Scenario, context: Context, setting: Setting, grid: Grid) -> Iterator[Cell]:
    entries = [
        entry
        for entry in scenario.methods
        if entry.name in (grid.methods or (entry.name,)) and setting in (entry.settings or (setting,))
    ]
    for bag_size in grid.bag_sizes or scenario.bag_sizes:
        for seed in grid.seeds or scenario.seeds:
            for entry in entries:
                # Methods that see labels get bags of one image whatever the size, so their cells coincide.
                fits = entry.method.sees_labels or bag_size in (entry.bag_sizes or (bag_size,))
                if fits and seed in (entry.seeds or (seed,)):
                    point = _Point(setting, 1 if entry.method.sees_labels else bag_size, seed)
                    yield from _of_entry(scenario, context, grid, entry, point)


class _Point(NamedTuple):
    """Name a point of a grid."""

    setting: Setting
    bag_size: int
    seed: int


def _of_entry(
    scenario: Scenario, context: Context, grid: Grid, entry: Entry, point: _Point
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
                "model.method": entry.method.value,
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
