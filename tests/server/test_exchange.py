"""A faulty update is named by what is wrong with it; a good one passes."""

import numpy as np
import pytest

from common.config_tables import FederationConfig
from common.records import FloatArray, ModelUpdate
from server.exchange import fault_of, is_replay

Arrays = dict[str, FloatArray]
LIMITS = FederationConfig(max_update_mb=10.0, max_change=100.0)


def model(value: float = 0.0) -> Arrays:
    return {"b": np.full(2, value, np.float32), "a": np.full((2, 3), value, np.float32)}


def update(value: float, bags: object = 4) -> ModelUpdate:
    return ModelUpdate(sender="north", round=1, arrays=model(value), metrics={"num-bags": bags})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ModelUpdate(sender="n", round=1, arrays={"a": np.zeros((2, 3), np.float32)}), "names differ"),
        (ModelUpdate(sender="n", round=1, arrays=model() | {"c": np.zeros(1, np.float32)}), "names differ"),
        (ModelUpdate(sender="n", round=1, arrays=model() | {"b": np.zeros(3, np.float32)}), "shape (3,)"),
        (update(np.nan), "NaN or infinity"),
        (update(-np.inf), "NaN or infinity"),
        (update(1e38), "would change by"),
        (update(40.0), "would change by 113"),  # sqrt(8) * 40 against a limit of 100 * (1 + 0)
        (update(1.0, bags=0), "num-bags"),
        (update(1.0, bags=2.5), "num-bags"),
    ],
)
def test_a_faulty_update_is_named(bad: ModelUpdate, reason: str) -> None:
    assert reason in fault_of(bad, model(), LIMITS)


def test_a_good_update_passes_and_the_limit_grows_with_the_model() -> None:
    assert fault_of(update(1.0), model(), LIMITS) == ""
    assert fault_of(update(40.0), model(1.0), LIMITS) == ""


def test_an_oversized_update_is_named() -> None:
    small = LIMITS.model_copy(update={"max_update_mb": 1e-6})
    assert "oversized" in fault_of(update(1.0), model(), small)


def test_the_same_arrays_are_taken_once_from_a_site() -> None:
    seen: dict[str, list[str]] = {}
    assert not is_replay(update(1.0), model(), seen)
    assert not is_replay(update(2.0), model(), seen)
    assert is_replay(update(1.0), model(), seen)
    other = ModelUpdate(sender="south", round=1, arrays=model(1.0))
    assert not is_replay(other, model(), seen)


def test_a_site_without_a_gradient_gives_back_what_it_was_sent_and_that_is_no_replay() -> None:
    seen: dict[str, list[str]] = {}
    for _ in range(3):
        assert not is_replay(update(1.0), model(1.0), seen)
    assert not is_replay(update(2.0), model(1.0), seen)
    assert is_replay(update(2.0), model(1.0), seen)
    assert not is_replay(update(2.0), model(2.0), seen)
