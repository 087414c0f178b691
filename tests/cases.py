"""Cases of which the short suite takes a few and the full one all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def shortened(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Mark the cases slow that are not among ``kept``; a tuple is one case of several arguments."""
    given = list(cases)
    assert all(case in given for case in kept), "a case that is kept is none of these"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if case in kept else [pytest.mark.slow]
        )
        for case in given
    ]
