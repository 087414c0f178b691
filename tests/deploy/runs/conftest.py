"""One small private run with a site that fails, watched by all tests here."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Error, Message

from common.config import RunConfig
from common.records import SiteError
from deploy.simulation.local_grid import LocalGrid
from server.app import app

PRIVATE = {
    "rounds": 2, "model.image-size": 16, "model.atoms-per-class": 2, "train.held-back": 0.25,
    "federation.sites": 3, "federation.quorum": 2, "federation.deadline": 60.0,
    "dp.epsilon": 4.0, "dp.delta": 1e-3, "dp.expected-bags": 3.0, "dp.steps-per-round": 2,
}  # fmt: skip
PLANTED = "cannot open /secret/path/patient-4711.png of class melanoma"


class Telling(LocalGrid):
    """The third site fails in round 2, and its error tells what it must not."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for number, reply in enumerate(replies):
            metadata = reply.metadata
            if (metadata.src_node_id, metadata.message_type, metadata.group_id) == (1003, "train", "2"):
                replies[number] = Message(Error(int(SiteError.DATA), PLANTED), reply_to=reply)
        return replies


@pytest.fixture(scope="session")
def watched_run(sites_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished private run of three sites; hospital-3 gave no update in round 2."""
    folder = tmp_path_factory.mktemp("watched")
    run = folder / "runs" / "first"
    sites = folder / "sites"
    shutil.copytree(sites_dir, sites)
    config = RunConfig().with_changes(PRIVATE | {"run-dir": str(run), "sites-dir": str(sites)})
    flat = config.to_flat()
    with Telling(3, flat) as grid:
        app(grid, grid.server_context(flat))
    return run


@pytest.fixture
def own_run(watched_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    copy = tmp_path / "runs" / "first"
    shutil.copytree(watched_run, copy)
    os.utime(copy / "config.toml", (1000.0, 1000.0))
    return copy
