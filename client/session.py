"""Open a site's session, which holds for one message all that the site needs to answer it.

The run's configuration and site.toml are parsed here, once per message, and nowhere else. Only here do a real
site and a simulated one differ, so that handlers and guard see the same. A real node's own configuration
names the site's folder, and a simulated node's number does: no server says where a site's data is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from client.data.bags import QUARANTINE_FILE, BagStore, OwnSplit
from client.ledger.file import LEDGER_FILE
from client.site import (
    DATA_PATH,
    KIT,
    PARTITION,
    SITE_FILE,
    SiteConfig,
    Terms,
    TrainingSeeds,
    derive,
    site_folders,
)
from common.config import RunConfig
from common.config_tables import ModelConfig
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.build import rebuild_model, trainable_parameters
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import load_arrays
from common.records import FloatArray
from common.settings_file import Section

_HELD_BACK_BAGS = "held-back bags"
"""What the key of a site's own split is derived for."""


@dataclass(frozen=True)
class SiteSession:
    """Hold the run, the site and the node of one message, and open the site's bags when they are needed."""

    config: RunConfig
    site: SiteConfig
    folder: Path
    """The site's folder."""
    node: Mapping[str, Any]
    """The node's own configuration, which no server can change."""
    run_id: int
    state: RecordDict
    """What Flower keeps for the node from message to message, in memory."""

    @classmethod
    def open(cls, context: Context) -> Self:
        """Open the session of the node that a message came to.

        Raises:
            ConfigError: the run's configuration or site.toml is faulty, the node has no site, or the site
                does not allow every part of the run.
            UserError: there is no such site folder.
        """
        config = RunConfig.from_flat(context.run_config)
        folder = _find_site(context.node_config, config.sites_dir)
        session = cls(
            config, SiteConfig.load(folder), folder, context.node_config, context.run_id, context.state
        )
        session.terms.refuse_parts(config.part_names)
        if not session.simulated and any("@" in name for name in config.model.feature_names):
            raise ConfigError(
                "this run names a weights file for its features (model.features), which is for simulations: "
                "no server says which files a site reads"
            )
        return session

    @property
    def simulated(self) -> bool:
        """Return whether the node belongs to a simulation."""
        return _is_simulated(self.node)

    @property
    def private(self) -> bool:
        """Return whether the run is private."""
        return self.config.dp.epsilon > 0

    @property
    def kit(self) -> Path | None:
        """Return the site's kit, if the node names one."""
        return Path(str(self.node[KIT])) if self.node.get(KIT) else None

    @cached_property
    def terms(self) -> Terms:
        """Return the site's policy with the defaults of this node."""
        return self.site.policy.terms(simulated=self.simulated)

    @property
    def skip_bad(self) -> bool:
        """Return whether bad rows are left out.

        The site's choice decides, and a run's only if the site has made none.
        """
        return self.config.skip_bad if self.terms.skip_bad is None else self.terms.skip_bad

    @cached_property
    def store(self) -> BagStore:
        """Open the site's bags, and set the threads that torch may use.

        Raises:
            DataError: bad rows, or no bag is left.
            UserError: the cache cannot be written.
        """
        if torch.get_num_threads() != self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        # What the owner writes; not the ledger and the quarantine list, which a run itself changes.
        tables = {self.folder / SITE_FILE, *self.folder.glob("*.csv")} - {self.folder / QUARANTINE_FILE}
        stamps = tuple(path.stat().st_mtime_ns for path in sorted(tables))
        wanted = (self.config.model.image_size, self.config.model.feature_names)
        store = _open_store(self.folder, self.site, stamps, wanted, self.skip_bad)
        return with_own_split(store, self.folder, self.terms, private=self.private)

    @cached_property
    def _split(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.store.split(self.config.train.held_back, self.config.seed)

    @property
    def training(self) -> int:
        """Return the number of bags that are trained on."""
        return len(self._split[0])

    @property
    def held_back(self) -> int:
        """Return the number of bags that are held back."""
        return len(self._split[1])

    @property
    def seeds(self) -> TrainingSeeds:
        """Return the seeds that the node trains with in its run.

        Raises:
            UserError: a real site's secret cannot be read or made.
        """
        if self.simulated:
            return TrainingSeeds(self.config.seed, self.site.name)
        secret = derive(self.folder, "training-seed", f"run {self.run_id}".encode())
        return TrainingSeeds(self.config.seed, self.site.name, secret)

    @property
    def version_name(self) -> str:
        """Return the name under which the data version leaves a site without a ledger, 64 hexadecimal digits.

        The data version itself is a hash: whoever knows all but one bag would find that bag by trying. This
        is derived from it under the site's secret.
        """
        return derive(self.folder, "data-version", self.store.data_version.encode()).hex()

    @property
    def run_name(self) -> str:
        """Return the name under which the ledger records the run."""
        return Path(self.config.run_dir).name if self.config.run_dir else f"{self.config.name}-{self.run_id}"

    @property
    def ledger_path(self) -> Path:
        """Return the path of the ledger.

        It lies with the site's data, or under the run for a simulated site without a budget.
        """
        # ``run-dir`` is a folder of the server's choice, so a real site never writes there.
        own = self.site.policy.budget.epsilon is not None
        if own or not self.simulated or not self.config.run_dir:
            return self.folder / LEDGER_FILE
        return Path(self.config.run_dir) / "sites" / self.folder.name / LEDGER_FILE

    def receive_model(self, arrays: dict[str, FloatArray]) -> HierarchicalClassifier:
        """Return the model with the arrays that the server sent."""
        model = self._architecture()
        load_arrays(model, arrays)
        return model

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array that training changes, by name, in the model's order."""
        parameters = self._architecture().named_parameters()
        return {name: tuple(p.shape) for name, p in parameters if p.requires_grad}

    def _architecture(self) -> HierarchicalClassifier:
        config = self.config
        model = _rebuilt(config.model, self.store.hierarchy, tuple(config.parts.items()))
        trainable_parameters(model, config.trained_part)
        return model


def _find_site(node: Mapping[str, Any], sites_dir: str) -> Path:
    """Return the folder of the site that a node belongs to.

    A SuperNode started with ``--node-config 'data-path="..."'`` is that site. A simulated node takes
    the folder of its number below ``sites_dir``.

    Args:
        node: the node's own configuration.
        sites_dir: what the run names as the folder of simulated sites.

    Raises:
        UserError: there is no such folder.
        ConfigError: the node is neither, or is a real site and the run asks for data elsewhere.
    """
    if not _is_simulated(node):
        return _own_folder(node, sites_dir)
    if not sites_dir:
        raise ConfigError(
            "a simulation needs a folder of sites (sites-dir); `fedbags bags build --source synthetic` draws "
            "one of synthetic hospitals"
        )
    number, sites = int(node[PARTITION]), site_folders(Path(sites_dir))
    if number >= len(sites):
        raise UserError(f"site number {number} asked for, but there are {len(sites)} site folders")
    return sites[number]


def _is_simulated(node: Mapping[str, Any]) -> bool:
    """Return whether a node belongs to a simulation.

    Such a node has a number, and neither data of its own nor a kit.
    """
    # Only the node's own configuration decides: a server that could declare a site simulated would get
    # seeded noise and the lax defaults.
    return PARTITION in node and not {DATA_PATH, KIT} & node.keys()


def with_own_split(store: BagStore, folder: Path, terms: Terms, *, private: bool) -> BagStore:
    """Give the bag store a division of its own, if the site decides how many bags it holds back.

    The held-back bags follow from the site's secret and the data version, and from nothing that a server
    sends. A run without privacy gets no figures of fewer bags than the site's minimum, so none are held back
    then.
    """
    if terms.held_back is None:
        return store
    key = derive(folder, _HELD_BACK_BAGS, store.data_version.encode())
    divided = replace(store, own_split=OwnSplit(terms.held_back, key))
    _, held_back = divided.split(terms.held_back, 0)
    if private or len(held_back) >= terms.minimum_held_back_bags:
        return divided
    # Too few for a figure that may leave, so they are better trained on.
    return replace(store, own_split=OwnSplit(0.0, key))


def _own_folder(node: Mapping[str, Any], sites_dir: str) -> Path:
    folder = Path(str(node.get(DATA_PATH, "")))
    if not node.get(DATA_PATH):
        raise ConfigError(
            f"this node has no site: start the SuperNode with --node-config '{DATA_PATH}=\"/path/to/site\"'"
        )
    if sites_dir:
        raise ConfigError(
            "this run names a folder of sites (sites-dir), which is for simulations: no server says where a "
            "site's data is"
        )
    if not (folder / SITE_FILE).is_file():
        raise UserError(f"the node's data-path is not a site folder: {folder}")
    return folder


@lru_cache(maxsize=64)
def _open_store(
    folder: Path,
    site: SiteConfig,
    stamps: tuple[int, ...],
    wanted: tuple[int, tuple[str, ...]],
    skip_bad: bool,
) -> BagStore:
    """Open the bag store once per process, version of the site's tables, image size and fixed features.

    A deployed site answers one message per process; a simulation answers many.
    """
    size, features = wanted
    return BagStore.open(folder, size, features=features, skip_bad=skip_bad, site=site)


@lru_cache(maxsize=2)
def _rebuilt(
    config: ModelConfig, hierarchy: Hierarchy, parts: tuple[tuple[str, Section], ...]
) -> HierarchicalClassifier:
    """Build the model once per process.

    It can be used again, since the next message overwrites every float of it.
    """
    return rebuild_model(config, hierarchy, dict(parts))
