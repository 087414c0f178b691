"""Writes small images for the layouts that the sources read."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
