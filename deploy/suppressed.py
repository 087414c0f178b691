"""Give the figures of a summary's level where sites suppressed small counts of test images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def known(level: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a level of a summary, or None where suppressed counts leave it open."""
    return None if "suppressed" in level else level.get(key)


def bounds_of(level: Mapping[str, Any], key: str = "accuracy") -> list[float] | None:
    """Return the two figures between which an accuracy of a level lies, or None where it is known."""
    found: list[float] | None = level.get("suppressed", {}).get(key)
    return found


def figure(value: float | None, bounds: Sequence[float] | None = None, none: str = "-") -> str:
    """Return a share as text, such as ``0.645``, or its bounds as text, such as ``0.61-0.68``."""
    if bounds is not None:
        low, high = bounds
        # Rounded outwards, so that the true figure lies between the two that are printed.
        return f"{math.floor(low * 100) / 100:.2f}-{math.ceil(high * 100) / 100:.2f}"
    return none if value is None else f"{value:.3f}"


def suppression(level: Mapping[str, Any]) -> str:
    """Return what sites suppressed of a level as text, such as ``14 cells below 5 suppressed``.

    Empty if they suppressed nothing.
    """
    found = level.get("suppressed")
    return f"{found['cells']} cells below {found['below']} suppressed" if found else ""
