"""What the privacy tests share: one small plan."""

from collections.abc import Callable
from typing import Any

import pytest

from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness


@pytest.fixture
def make_plan() -> Callable[..., PrivacyPlan]:
    """A plan of 12 bags; takes changes by name."""

    def make(**changes: Any) -> PrivacyPlan:
        settings: dict[str, Any] = {
            "noise_multiplier": 2.0,
            "delta": 1e-3,
            "clip_norm": 0.5,
            "number_of_bags": 12,
            "expected_bags_per_step": 1.2,
            "steps_per_round": 5,
            "rounds": 4,
            "release": None,
            "randomness": InsecureSeededRandomness(3, "site-1"),
        }
        return PrivacyPlan.build(**(settings | changes))

    return make
