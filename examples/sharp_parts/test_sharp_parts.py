"""How a package of parts is tested: the plugin comes with fedbags."""

from collections.abc import Callable

import pytest
from sharp_parts import PARTS

from common.parts import Part


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_part_conforms(conformance: Callable[[Part], list[str]], part: Part) -> None:
    """Check each part against the contracts of the house."""
    assert "may train privately: one bag alone, checked" in conformance(part)
