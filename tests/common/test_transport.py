"""What travels, in bytes: as much as the raw parameters at 32 bits, and half of it at 16."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from common.config import RunConfig
from common.config_tables import Transport
from common.errors import RunError
from common.records import ModelUpdate, PrivacyStatement
from common.wire import from_records, to_records
from deploy.flower.internals import become_server
from deploy.simulation.local_grid import LocalGrid
from server.app import app


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    """About a million float32 parameters, in the sizes of a small ResNet's layers."""
    rng = np.random.default_rng(seed)
    shapes = {f"conv{i}.weight": (64, 64, 3, 3) for i in range(24)} | {
        f"norm{i}.weight": (64,) for i in range(48)
    }
    shapes |= {"head.weight": (512, 200), "head.bias": (200,)}
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message as Flower sends it: every object of it, and the tree that lists them."""
    become_server()
    message = Message(content, dst_node_id=1001, message_type="train", ttl=60.0, group_id="1")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = get_all_nested_objects(message)
    return sum(len(o.deflate()) for o in objects.values()) + get_object_tree(message).ByteSize()


@pytest.mark.parametrize(("transport", "least", "most"), [("float32", 1.0, 1.05), ("float16", 0.5, 0.525)])
def test_bytes_on_the_wire_against_raw_parameters(transport: str, least: float, most: float) -> None:
    arrays = parameters()
    raw = sum(array.nbytes for array in arrays.values())
    assert raw > 4e6 * 0.95
    update = ModelUpdate(sender="north", round=1, arrays=arrays, metrics={"num-bags": 10, "loss": 0.5})
    content = to_records(update, PrivacyStatement(site="north", round=1), transport=Transport(transport))
    ratio = wire_bytes(content) / raw
    print(f"{transport}: {ratio:.4f} of {raw} bytes")
    assert least <= ratio <= most


def test_sixteen_bits_round_to_nearest_and_come_back_as_float32() -> None:
    arrays = parameters()
    update = ModelUpdate(sender="north", round=1, arrays=arrays)
    back = from_records(to_records(update, transport=Transport.FLOAT16), ModelUpdate)
    for name, array in arrays.items():
        assert back.arrays[name].dtype == np.float32
        normal = np.abs(array) >= np.finfo(np.float16).tiny
        error = np.abs(back.arrays[name] - array)
        assert (error[normal] <= np.abs(array[normal]) * 2.0**-11).all()
        assert (error[~normal] <= 2.0**-25).all()
    again = from_records(to_records(back, transport=Transport.FLOAT16), ModelUpdate)
    for name, array in back.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_sixteen_bits_round_a_typical_change_less_than_bfloat16_would() -> None:
    # The reason for IEEE half precision: a step of 1% of a weight must survive.
    rng = np.random.default_rng(1)
    before = rng.normal(0, 0.05, 100_000).astype(np.float32)
    after = before * np.float32(1.01)
    half = after.astype(np.float16).astype(np.float32)
    bits = after.view(np.uint32)
    bfloat = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    step = np.linalg.norm(after - before)
    assert np.linalg.norm(half - after) < 0.03 * step
    assert np.linalg.norm(bfloat - after) > 0.15 * step


def test_a_value_that_sixteen_bits_cannot_hold_is_an_error_and_never_infinity() -> None:
    update = ModelUpdate(sender="north", round=1, arrays={"w": np.array([1e5], np.float32)})
    with pytest.raises(RunError, match=r"'w' has a value beyond 65504.*\n?.*float32"):
        to_records(update, transport=Transport.FLOAT16)
    assert from_records(to_records(update), ModelUpdate).arrays["w"][0] == np.float32(1e5)
    # What is not finite already goes through: the receiver refuses it by its name.
    lost = ModelUpdate(sender="north", round=1, arrays={"w": np.array([np.inf, np.nan], np.float32)})
    assert not np.isfinite(
        from_records(to_records(lost, transport=Transport.FLOAT16), ModelUpdate).arrays["w"]
    ).any()


class Listening(LocalGrid):
    """Notes the dtypes of the arrays that pass, both ways."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: dict[str, set[str]] = {"sent": set(), "received": set()}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self._note("sent", messages)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self._note("received", replies)
        return replies

    def _note(self, way: str, messages: Iterable[Message]) -> None:
        for message in messages:
            for record in message.content.array_records.values():
                self.heard[way] |= {array.dtype for array in record.values()}


@pytest.mark.parametrize("transport", ["float32", "float16"])
def test_a_run_sends_arrays_both_ways_in_the_transport_that_it_asks_for(
    small_config: Callable[..., RunConfig], transport: str
) -> None:
    config = small_config({"rounds": 1, "federation.transport": transport})
    with Listening(3, config.to_flat()) as grid:
        app(grid, grid.server_context(config.to_flat()))
    assert grid.heard == {"sent": {transport}, "received": {transport}}
    assert (Path(config.run_dir) / "model.safetensors").exists()
