"""What the privacy tests share: one small plan."""

from collections.abc import Callable
from typing import Any

import pytest

from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness


@pytest.fixture
def make_plan() -> Callable[..., PrivacyPlan]:
    """A plan of 12 bags; takes changes by name."""

    def make(**changes: Any) -> PrivacyPlan:
        settings: dict[str, Any] = {
            "delta": 1e-3,
            "clip_norm": 0.5,
            "number_of_bags": 12,
            "sample_rate": 0.1,
            "steps_per_round": 5,
            "rounds": 4,
            "release": None,
        }
        asked: dict[str, Any] = {
            "noise_multiplier": 2.0,
            "randomness": InsecureSeededRandomness(3, "site-1"),
        }
        for name, value in changes.items():
            (settings if name in PlanSettings.__annotations__ else asked)[name] = value
        return PrivacyPlan.build(PlanSettings(**settings), **asked)

    return make
