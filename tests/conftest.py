"""Small site folders and a grid that answers by itself, for tests of the apps."""

import gc
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import RunConfig
from common.privacy import accounting
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals

SIZE = 16
"""Side of the test images, pixels."""
_FINE = accounting._FINEST, accounting._COARSEST


def pytest_collection_finish() -> None:
    """Leave what the libraries hold out of every later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let libraries that count what they leave behind find it."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _grid_of_the_accountant(request: pytest.FixtureRequest) -> None:
    """Compute on a grid eight times wider, which gives upper bounds too, where figures are no matter."""
    fine = {"privacy", "deployment"} & {*request.path.parts} or "fine_grid" in request.fixturenames
    grid = _FINE if fine else (_FINE[0] * 8, _FINE[1] * 8)
    if grid != (accounting._FINEST, accounting._COARSEST):
        accounting._FINEST, accounting._COARSEST = grid
        accounting._kept = ()
        for remembered in (accounting._search, accounting._epsilon, accounting._coarse, accounting._fine):
            remembered.cache_clear()


@pytest.fixture
def fine_grid() -> None:
    """Ask for the grid of the product, as processes and files of other tests have it."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    # A shell lets what it runs in the background ignore Ctrl-C, and so would all that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_global_randomness() -> None:
    np.random.seed(0)  # noqa: NPY002 (what is under test must not depend on it)
    # torch.manual_seed formats a stack trace for each kind of accelerator, milliseconds for each test.
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def sites_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small synthetic hospitals; tests that change a site copy it first."""
    out = tmp_path_factory.mktemp("data") / "sites"
    write_synthetic_sites(
        out,
        SyntheticHospitals(
            sites=3, seed=1, images_per_site=64, image_size=SIZE, session_size=8, test_images_per_site=24
        ),
    )
    return out


@pytest.fixture
def small_config(sites_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the configuration of a run of a second; takes changes by dotted key."""

    def make(changes: dict[str, bool | int | float | str] | None = None) -> RunConfig:
        base = {
            "run-dir": str(tmp_path / "run"),
            "sites-dir": str(sites_dir),
            "rounds": 2,
            "model.image-size": SIZE,
            "model.backbone": "colour-histogram",
            "model.atoms-per-class": 2,
            "federation.sites": 3,
            "federation.deadline": 60.0,
            "federation.patience": 0.0,
            "train.held-back": 0.25,
        }
        return RunConfig().with_changes(base | (changes or {}))

    return make
