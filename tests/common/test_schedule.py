"""The learning rate's way down."""

import pytest

from common.config_tables import cosine_decay, run_progress

FLOOR = 0.05


def test_a_run_goes_from_nothing_to_all() -> None:
    assert [run_progress(round, 5) for round in range(1, 6)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert run_progress(1, 1) == 0.0


def test_half_a_cosine_from_one_to_the_floor() -> None:
    assert [cosine_decay(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, (1 + FLOOR) / 2, FLOOR])
    assert cosine_decay(0.25) == pytest.approx(FLOOR + (1 - FLOOR) * (2 + 2**0.5) / 4)
