"""What the tests of common share: one small tree."""

import pytest

from common.hierarchy import Hierarchy


@pytest.fixture
def tree() -> Hierarchy:
    """2 / 3 / 4 classes: a -> (m -> 1, 2; n -> 3), b -> (o -> 4)."""
    rows = [["a", "m", "1"], ["a", "m", "2"], ["a", "n", "3"], ["b", "o", "4"]]
    return Hierarchy.from_rows(["top", "middle", "leaf"], rows)
