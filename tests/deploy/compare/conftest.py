"""A small archive, scenarios as text, and cells that run in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.compare import run as comparison
from deploy.compare.cell import _work
from deploy.compare.plan import LOG

SIZE = 16
LEAVES = 4
TRAIN, TEST, TRACK = 320, 48, 4

Write = Callable[..., Path]


def pixels(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images whose brightness and half tell the leaf, under some noise."""
    images = rng.normal(60.0, 20.0, (len(labels), SIZE, SIZE, 3))
    images[labels % 2 == 1, : SIZE // 2] += 110
    images[labels // 2 == 1, :, :, 0] += 80
    return np.clip(images, 0, 255).astype(np.uint8)


def write_archive(path: Path, **changes: Any) -> Path:
    """Two levels of 2 and 4 classes; the training images come in tracks of four of one class."""
    rng = np.random.default_rng(0)
    tracks = np.arange(TRAIN) // TRACK
    train, test = tracks % LEAVES, np.arange(TEST) % LEAVES
    usual = {
        "x_train": pixels(train, rng), "y1_train": train // 2, "y2_train": train, "track_train": tracks,
        "x_test": pixels(test, rng), "y1_test": test // 2, "y2_test": test,
        "names1": ["dark", "red"], "names2": ["plain", "capped", "red plain", "red capped"],
        "tree_2to1": [0, 0, 1, 1],
    }  # fmt: skip
    np.savez_compressed(path, **(usual | changes))
    return path


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once; tests that need another write their own."""
    return write_archive(tmp_path_factory.mktemp("archive") / "small.npz")


SCENARIO = """
title = "small"
bag-sizes = [8]
seeds = [0]
passes = 2
images-per-step = 32

[data]
source = "archive"
path = "{archive}"
groups = "sites"
partition = "dirichlet:1.0"
sites = 2

[run]
model.image-size = 16
model.backbone = "colour-histogram"
model.atoms-per-class = 2
train.augmentation = "none"
"""

DLLP = """
[[methods]]
name = "dllp"
method = "dllp"
"""


@pytest.fixture
def scenario(tmp_path: Path, archive: Path) -> Write:
    """Write a scenario: the text after [run], and replacements in what stands before."""

    def write(rest: str = DLLP, **replaced: str) -> Path:
        text = SCENARIO.format(archive=archive)
        for old, new in replaced.items():
            lines = text.splitlines()
            key = old.replace("_", "-")
            assert any(line.startswith(f"{key} =") for line in lines), key
            text = "\n".join(f"{key} = {new}" if line.startswith(f"{key} =") else line for line in lines)
        path = tmp_path / "scenario.toml"
        path.write_text(f"{text}\n{rest}\n")
        return path

    return write


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run one after the other here: a process of its own takes seconds to start."""

    def run_all(
        folders: Sequence[Path],
        jobs: int,
        look: Callable[[Sequence[Path]], None],
        ended: Callable[[Path, int], None],
    ) -> None:
        for folder in folders:
            look([folder])
            (folder / LOG).touch()
            _work(folder)
            ended(folder, 0)

    monkeypatch.setattr(comparison, "run_all", run_all)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than a cell."""
    monkeypatch.setattr(comparison.plots, "draw_plots", lambda *_: [])
