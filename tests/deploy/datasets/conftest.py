"""Writes small images for the layouts that the sources read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.datasets.files import SourceTable
from tests.deploy.datasets.layouts import draw_image

Draw = Callable[[Path], None]


@pytest.fixture
def draw() -> Draw:
    """Write a small image of random pixels, different for every name."""
    return draw_image


@pytest.fixture
def leaf_names() -> Callable[[SourceTable], list[str]]:
    """The leaf name of every row of a table."""
    return lambda table: [table.hierarchy.classes[-1][leaf] for leaf in table.labels]


@pytest.fixture
def noise() -> Callable[[Path, int], None]:
    """Write a small PNG of random pixels, different for every seed."""

    def write(path: Path, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    return write
