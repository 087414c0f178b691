"""Offer the checks of a part to pytest: a plugin that comes with fedbags, for our parts and those of others.

    @pytest.mark.parametrize("part", my_parts.PARTS, ids=lambda part: part.name)
    def test_part(conformance, part):
        conformance(part)

Every run of pytest in an environment with fedbags loads this module, so torch waits until a part is checked.
"""

from collections.abc import Callable

import pytest

from common.errors import UserError
from common.parts import Part
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy import part_checks


@pytest.fixture
def conformance() -> Callable[[Part], list[str]]:
    """Return the function that checks a part and fails with what it finds."""

    def checked(part: Part) -> list[str]:
        try:
            return part_checks.check(part)
        except UserError as error:
            raise AssertionError(str(error)) from error

    return checked
