"""Open for each answer the run's configuration, the site's terms and bags, and the model.

Only here do a real site and a simulated one differ, so that handlers and guard see the same. Knows nothing
of messages.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context

from client.data.bags import QUARANTINE_FILE, BagStore, OwnSplit
from client.locate import find_site, is_simulated
from client.seeds import derive
from client.site import SITE_FILE, SiteConfig, Terms
from common.config import RunConfig
from common.config_tables import ModelConfig
from common.hierarchy import Hierarchy
from common.model.build import rebuild_model, trainable_parameters
from common.model.lhfglp import LHFGLP
from common.model.model_file import load_arrays
from common.records import FloatArray

HELD_BACK_BAGS = "held-back bags"
"""What the key of a site's own split is derived for."""


def terms_of(context: Context, site: SiteConfig) -> Terms:
    """Return the terms of the site at this node."""
    return site.policy.terms(simulated=is_simulated(context))


def skips_bad(config: RunConfig, terms: Terms) -> bool:
    """Return whether bad rows are left out.

    The site's choice decides, and a run's only if the site has made none.
    """
    return config.skip_bad if terms.skip_bad is None else terms.skip_bad


def open_site(context: Context) -> tuple[RunConfig, BagStore]:
    """Return the run's configuration and the site's bags, and set the threads that torch may use."""
    config = RunConfig.from_flat(context.run_config)
    if torch.get_num_threads() != config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder = find_site(context)
    terms = terms_of(context, SiteConfig.load(folder))
    # What the owner writes; not the ledger and the quarantine list, which a run itself changes.
    tables = {folder / SITE_FILE, *folder.glob("*.csv")} - {folder / QUARANTINE_FILE}
    stamps = tuple(path.stat().st_mtime_ns for path in sorted(tables))
    store = _open_store(folder, stamps, config.model.image_size, skips_bad(config, terms))
    return config, with_own_split(store, folder, terms, private=config.dp.epsilon > 0)


def with_own_split(store: BagStore, folder: Path, terms: Terms, *, private: bool) -> BagStore:
    """Give the bag store a division of its own, if the site decides how many bags it holds back.

    The held-back bags follow from the site's secret and the data version, and from nothing that a server
    sends. A run without privacy gets no figures of fewer bags than the site's minimum, so none are held back
    then.
    """
    if terms.held_back is None:
        return store
    key = derive(folder, HELD_BACK_BAGS, store.data_version.encode())
    divided = replace(store, own_split=OwnSplit(terms.held_back, key))
    _, held_back = divided.split(terms.held_back, 0)
    if private or len(held_back) >= terms.minimum_held_back_bags:
        return divided
    # Too few for a figure that may leave, so they are better trained on.
    return replace(store, own_split=OwnSplit(0.0, key))


@lru_cache(maxsize=64)
def _open_store(folder: Path, stamps: tuple[int, ...], size: int, skip_bad: bool) -> BagStore:
    """Open the bag store once per process and version of the site's tables.

    A deployed site answers one message per process; a simulation answers many.
    """
    return BagStore.open(folder, size, skip_bad=skip_bad)


def receive_model(config: RunConfig, hierarchy: Hierarchy, arrays: dict[str, FloatArray]) -> LHFGLP:
    """Return the model with the arrays that the server sent."""
    model = _architecture(config.model, hierarchy)
    trainable_parameters(model, config.trained_part)
    load_arrays(model, arrays)
    return model


def trained_shapes(config: RunConfig, hierarchy: Hierarchy) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array that training changes, by name, in the model's order."""
    model = _architecture(config.model, hierarchy)
    trainable_parameters(model, config.trained_part)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@lru_cache(maxsize=2)
def _architecture(config: ModelConfig, hierarchy: Hierarchy) -> LHFGLP:
    """Build the model once per process.

    It can be used again, since the next message overwrites every float of it.
    """
    return rebuild_model(config, hierarchy)
