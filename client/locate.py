"""Find the folder of the site that a node belongs to.

In a deployment the node's own configuration names it; in a simulation the node's number does. A server has no
part in it: what a run's configuration names as a folder counts for simulated nodes alone.
"""

import fcntl
from pathlib import Path
from typing import TYPE_CHECKING

from client.site import BUILD_ADVICE, SITE_FILE
from common.config import RunConfig
from common.errors import ConfigError, UserError

if TYPE_CHECKING:  # whoever only looks for site folders need not wait for Flower
    from flwr.app import Context

DATA_PATH, KIT, PARTITION = "data-path", "kit", "partition-id"
SYNTHETIC_CACHE = Path(".fedbags") / "synthetic"


def find_site(context: "Context") -> Path:
    """Return the folder of the site that this node belongs to.

    A SuperNode started with ``--node-config 'data-path="..."'`` is that site. A simulated node takes
    the folder of its number below ``sites-dir``; without one, a synthetic hospital that is drawn once
    and kept in the user's home.

    Raises:
        UserError: there is no such folder.
        ConfigError: the node is neither, or is a real site and the run asks for data elsewhere.
    """
    config = RunConfig.from_flat(context.run_config)
    if not is_simulated(context):
        return _own_folder(context, config)
    number = int(context.node_config[PARTITION])
    sites = site_folders(Path(config.sites_dir)) if config.sites_dir else synthetic_sites(config)
    if number >= len(sites):
        raise UserError(f"site number {number} asked for, but there are {len(sites)} site folders")
    return sites[number]


def is_simulated(context: "Context") -> bool:
    """Return whether the node belongs to a simulation.

    Such a node has a number, and neither data of its own nor a kit.
    """
    # Only the node's own configuration decides: a server that could declare a site simulated would get
    # seeded noise and the lax defaults.
    return PARTITION in context.node_config and not {DATA_PATH, KIT} & context.node_config.keys()


def site_folders(sites_dir: Path) -> list[Path]:
    """Return every folder below ``sites_dir`` that holds a site.toml, sorted by name.

    A hidden folder is left out: a build that was broken off leaves one.

    Raises:
        UserError: there is none.
    """
    found = (path.parent for path in sites_dir.glob(f"*/{SITE_FILE}"))
    folders = sorted(folder for folder in found if not folder.name.startswith("."))
    if not folders:
        raise UserError(
            f"no site folder (one with a {SITE_FILE}) in {sites_dir}\n"
            f"{BUILD_ADVICE} Without --sites-dir there are synthetic hospitals."
        )
    return folders


def synthetic_sites(config: RunConfig) -> list[Path]:
    """Return the folders of a configuration's synthetic hospitals, drawn once and kept."""
    from deploy.datasets.synthetic import write_synthetic_sites

    sites, size, seed = config.federation.sites, config.model.image_size, config.seed
    root = Path.home() / SYNTHETIC_CACHE
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        # Several processes of a simulation may start at once, and drawing takes a while.
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = root / f"sites-{sites}-pixels-{size}-seed-{seed}"
        if not target.exists():
            write_synthetic_sites(target, sites=sites, seed=seed, image_size=size)
    return site_folders(target)


def _own_folder(context: "Context", config: RunConfig) -> Path:
    folder = Path(str(context.node_config.get(DATA_PATH, "")))
    if not context.node_config.get(DATA_PATH):
        raise ConfigError(
            f"this node has no site: start the SuperNode with --node-config '{DATA_PATH}=\"/path/to/site\"'"
        )
    if config.sites_dir:
        raise ConfigError(
            "this run names a folder of sites (sites-dir), which is for simulations: no server says where a "
            "site's data is"
        )
    if not (folder / SITE_FILE).is_file():
        raise UserError(f"the node's data-path is not a site folder: {folder}")
    return folder
