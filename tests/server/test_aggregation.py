"""Updates are averaged one at a time, and handed to Flower's own strategies."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from hypothesis import given
from hypothesis import strategies as st

from common import parts
from common.config import RunConfig
from common.config_tables import FederationConfig, Strategy, cosine_decay
from common.errors import ConfigError
from common.parts import Kind, Part
from common.records import FloatArray, ModelUpdate
from server.aggregation import ServerOptimiser, _Collected, _StreamingMean
from server.strategies import WEIGHT, Rule

Arrays = dict[str, FloatArray]


def model(value: float = 0.0) -> Arrays:
    return {"b": np.full(2, value, np.float32), "a": np.full((2, 3), value, np.float32)}


def update(value: float, bags: object = 4) -> ModelUpdate:
    return ModelUpdate(sender="north", round=1, arrays=model(value), metrics={"num-bags": bags})


def one_step(config: FederationConfig, updates: list[tuple[ModelUpdate, float]], rounds: int = 1) -> Arrays:
    optimiser, current = ServerOptimiser(config), model()
    for number in range(1, rounds + 1):
        collected = optimiser.aggregator()
        for item, weight in updates:
            collected.add(item, weight)
        current = optimiser.step(current, collected, number, 3)
    return current


@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 50)), min_size=1, max_size=6),
)
def test_the_streaming_mean_is_the_float64_mean(pairs: list[tuple[float, int]]) -> None:
    mean = one_step(FederationConfig(), [(update(value), float(weight)) for value, weight in pairs])
    expected = np.average([value for value, _ in pairs], weights=[weight for _, weight in pairs])
    for array in mean.values():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-5)


def test_streaming_equals_flowers_own_aggregation_of_all_replies() -> None:
    updates = [(update(value), weight) for value, weight in ((1.0, 1.0), (3.0, 3.0), (-2.0, 2.0))]
    kept = _Collected()
    for item, weight in updates:
        kept.add(item, weight)
    theirs, _ = FedAvg(weighted_by_key="weight").aggregate_train(1, kept.replies())
    assert theirs is not None
    ours = one_step(FederationConfig(), updates)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name].numpy(), rtol=1e-6)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_strategy_moves_towards_the_updates_and_keeps_names_and_dtype(strategy: Strategy) -> None:
    config = FederationConfig(strategy=strategy, server_learning_rate=0.5)
    result = one_step(config, [(update(1.0), 1.0), (update(1.0), 1.0), (update(1.0), 1.0)])
    assert result.keys() == model().keys()
    for name, array in result.items():
        assert array.dtype == np.float32
        assert array.shape == model()[name].shape
        assert (array > 0).all()


@pytest.mark.parametrize("strategy", [Strategy.MEDIAN, Strategy.TRIMMED_MEAN, Strategy.KRUM])
def test_robust_strategies_ignore_one_outlier(strategy: Strategy) -> None:
    config = FederationConfig(strategy=strategy, trim=0.25, byzantine=1)
    values = (1.0, 1.1, 0.9, 1.0, 1e6)
    result = one_step(config, [(update(value), 1.0) for value in values])
    assert all(abs(array - 1).max() < 0.2 for array in result.values())


def test_arrays_are_paired_by_name_whatever_their_order() -> None:
    # FedAvgM pairs by position: a sender's order must not matter.
    config = FederationConfig(strategy=Strategy.FEDAVGM, server_momentum=0.5)
    shuffled = ModelUpdate(
        sender="n", round=1, arrays={"a": model(2.0)["a"], "b": model(1.0)["b"]}, metrics={"num-bags": 1}
    )
    result = one_step(config, [(shuffled, 1.0)])
    assert (result["a"] == 2.0).all()
    assert (result["b"] == 1.0).all()


@pytest.mark.parametrize("strategy", [Strategy.FEDAVGM, Strategy.FEDADAM, Strategy.FEDYOGI])
def test_optimiser_state_survives_a_checkpoint(strategy: Strategy) -> None:
    config = FederationConfig(strategy=strategy, server_learning_rate=0.1)
    unbroken = one_step(config, [(update(1.0), 1.0)], rounds=4)
    first, current = ServerOptimiser(config), model()
    for number in (1, 2):
        collected = first.aggregator()
        collected.add(update(1.0), 1.0)
        current = first.step(current, collected, number, 4)
    second = ServerOptimiser(config)
    second.load_state(first.state())
    for number in (3, 4):
        collected = second.aggregator()
        collected.add(update(1.0), 1.0)
        current = second.step(current, collected, number, 4)
    for name in current:
        np.testing.assert_array_equal(current[name], unbroken[name])


def test_the_attributes_that_hold_flowers_state_are_still_there() -> None:
    # A checkpoint reads them: if Flower renames one, resuming would silently forget the optimiser.
    adam, momentum = FedAdam(), FedAvgM(server_momentum=0.9)
    assert hasattr(adam, "m_t")
    assert hasattr(adam, "v_t")
    assert hasattr(adam, "current_arrays")
    assert hasattr(momentum, "momentum_vector")


def test_memory_of_the_mean_does_not_grow_with_the_number_of_updates() -> None:
    mean = _StreamingMean()
    for _ in range(100):
        mean.add(update(1.0), 1.0)
    (reply,) = mean.replies()
    assert isinstance(reply, Message)
    assert isinstance(reply.content, RecordDict)
    assert isinstance(reply.content["arrays"], ArrayRecord)
    assert mean.count == 100


@pytest.mark.parametrize("strategy", [Strategy.FEDADAM, Strategy.FEDYOGI, Strategy.FEDAVGM])
def test_the_servers_rate_falls_with_the_sites(strategy: Strategy) -> None:
    """A constant update moves the model by the rate: at the last round by a twentieth of what it was."""

    def moved(decays: bool, round: int) -> float:
        config = FederationConfig(strategy=strategy, server_learning_rate=0.5, server_decay=decays)
        optimiser = ServerOptimiser(config)
        collected = optimiser.aggregator()
        collected.add(update(1.0), 1.0)
        return float(optimiser.step(model(), collected, round, 10)["b"][0])

    assert moved(True, 10) == pytest.approx(cosine_decay(1.0) * moved(False, 10), rel=1e-5)
    assert moved(True, 1) == pytest.approx(moved(False, 1))


class Halving(FedAvg):
    """A strategy of somebody else: the mean of the replies, halved."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        return {name: Array(array.numpy() / 2) for name, array in arrays.items()}, metrics


def test_a_strategy_of_ones_own_is_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_registered", {})
    with pytest.raises(ConfigError, match=r"no strategy 'halving'.*known: fedavg"):
        RunConfig().with_changes({"federation.strategy": "halving"})
    parts.register_part(
        Part(
            Kind.STRATEGY, "halving", lambda config, settings: Rule(Halving(weighted_by_key=WEIGHT)), "a test"
        )
    )
    config = RunConfig().with_changes({"federation.strategy": "halving"})
    assert config.federation.strategy == "halving"
    updates = [(update(1.0), 1.0), (update(3.0), 3.0)]
    usual, ours = (one_step(FederationConfig(strategy=name), updates) for name in ("fedavg", "halving"))
    for name, array in usual.items():
        np.testing.assert_allclose(ours[name], array / 2)
