"""What a hostile site may send instead of an update: each is refused, told by name, and the run goes on."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord

from common.records import ModelUpdate, PrivacyStatement, SiteError
from common.records import Record as OurRecord
from common.wire import from_records, to_records

Change = Callable[[Message], None]


def arrays(change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> Change:
    """A reply with other arrays; one of another dtype makes all of that dtype."""

    def apply(reply: Message) -> None:
        honest = from_records(reply.content, ModelUpdate)
        changed = change({name: np.array(array) for name, array in honest.arrays.items()})
        records = to_records(honest.model_copy(update={"arrays": changed}))
        reply.content["arrays"], reply.content["update"] = records["arrays"], records["update"]

    return apply


def vector(change: Callable[[np.ndarray], Array | np.ndarray]) -> Change:
    """A reply with other numbers under the same names and shapes."""

    def apply(reply: Message) -> None:
        changed = change(np.array(reply.content.array_records["arrays"]["arrays"].numpy()))
        changed = changed if isinstance(changed, Array) else Array(changed)
        reply.content["arrays"] = ArrayRecord({"arrays": changed})

    return apply


def shapes(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """A reply with other shapes for the same numbers."""

    def apply(reply: Message) -> None:
        head = json.loads(str(reply.content.config_records["update"]["json"]))
        head["shapes"] = change(head["shapes"])
        reply.content["update"] = ConfigRecord({"json": json.dumps(head)})

    return apply


def second_array(reply: Message) -> None:
    reply.content.array_records["arrays"]["images"] = Array(np.zeros(3, np.float32))


def first(change: Callable[[np.ndarray], Any]) -> Change:
    """A reply whose first array is another."""

    def apply(values: dict[str, np.ndarray]) -> dict[str, Any]:
        name = min(values)
        return {**values, name: change(values[name])}

    return arrays(apply)


def with_one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return apply


def record(kind: type[OurRecord], **fields: Any) -> Change:
    """A reply with a record whose fields are others."""

    def apply(reply: Message) -> None:
        own = {name: from_records(reply.content, name) for name in (ModelUpdate, PrivacyStatement)}
        own[kind] = own[kind].model_copy(update=fields)
        reply.content = to_records(*own.values())

    return apply


def metrics(**changed: Any) -> Change:
    def apply(reply: Message) -> None:
        reply.content["metrics"] = MetricRecord(changed)

    return apply


def without(name: str) -> Change:
    def apply(reply: Message) -> None:
        del reply.content[name]

    return apply


def also(name: str) -> Change:
    def apply(reply: Message) -> None:
        reply.content[name] = ConfigRecord({"json": "{}"})

    return apply


def raw(data: bytes) -> Callable[[np.ndarray], Array]:
    """An array that says it is what the server wants, and holds these bytes."""
    return lambda array: Array("float32", array.shape, "numpy.ndarray", data)


def bomb(array: np.ndarray) -> Array:
    """A few bytes that claim to be 4 TB."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    return raw(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)(array)


ATTACKS: dict[str, tuple[Change, str]] = {
    "NaN": (first(with_one(np.nan)), "holds NaN or infinity"),
    "infinity": (first(with_one(np.inf)), "holds NaN or infinity"),
    "minus infinity": (first(with_one(-np.inf)), "holds NaN or infinity"),
    "one huge value": (first(with_one(1e30)), "the model would change by 1e+30"),
    "all values huge": (arrays(lambda a: {k: v + np.float32(1e9) for k, v in a.items()}), "would change by"),
    "another shape": (first(lambda a: np.zeros(7, np.float32)), "has shape (7,)"),
    "transposed": (first(lambda a: a.reshape((*a.shape, 1))), "has shape"),
    "float64": (first(lambda a: a.astype(np.float64)), "dtype float64"),
    "integers": (vector(lambda v: v.astype(np.int32)), "dtype int32"),
    "a missing array": (arrays(lambda a: dict(list(a.items())[1:])), "array names differ"),
    "no array": (arrays(lambda a: {}), "array names differ"),
    "an extra array": (arrays(lambda a: {**a, "extra": np.zeros(1, np.float32)}), "['extra']"),
    "a second array": (second_array, "record 'arrays' is malformed"),
    "bytes that are no array": (vector(raw(b"nonsense")), "cannot be read"),
    "a pickle": (vector(raw(b"\x80\x04K\x01.")), "cannot be read"),
    "no bytes": (vector(raw(b"")), "cannot be read"),
    "a claim of four terabytes": (vector(bomb), "cannot be read"),
    "a false dtype": (
        vector(lambda v: Array("float32", v.shape, "numpy.ndarray", Array(v.astype(np.float64)).data)),
        "not of the dtype and shape that it says",
    ),
    "a number too few": (vector(lambda v: v[1:]), "numbers are named"),
    "a number too many": (vector(lambda v: np.append(v, v[:1])), "numbers are named"),
    "a matrix of numbers": (vector(lambda v: v[None]), "numbers are named"),
    "a negative shape": (shapes(lambda s: {**s, "a": [-1, 1], "b": [1, 1]}), "greater than or equal to 0"),
    "shapes beyond 64 bits": (shapes(lambda s: {**s, min(s): [2**62, 8]}), "numbers are named"),
    "a shape that is none": (shapes(lambda s: {**s, min(s): "all"}), "unreadable reply"),
    "numbers without names": (shapes(lambda s: {}), "0 numbers are named"),
    "another site's name": (record(ModelUpdate, sender="east"), "reply of 'east'"),
    "an earlier round": (record(ModelUpdate, round=1), "for round 1"),
    "a later round": (record(ModelUpdate, round=9), "for round 9"),
    "another site's statement": (record(PrivacyStatement, site="east"), "privacy statement of 'east'"),
    "an earlier statement": (record(PrivacyStatement, round=1), "privacy statement of 'north' for round 1"),
    "no statement": (without("privacy"), "records"),
    "no metrics": (without("metrics"), "records"),
    "a further record": (also("labels"), "labels"),
    "no bags": (metrics(loss=1.0), "num-bags"),
    "minus three bags": (metrics(**{"num-bags": -3}), "num-bags"),
    "half a bag": (metrics(**{"num-bags": 0.5}), "num-bags"),
    "a loss of NaN": (metrics(**{"num-bags": 10, "loss": float("nan")}), "unreadable reply"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_refused_told_by_name_and_changes_nothing(
    federation: Any, three: dict[int, str], attack: str
) -> None:
    change, reason = ATTACKS[attack]

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind, round) == ("north", "train", 2):
            change(reply)
        return reply

    summary = federation.run(federation.sites(dict(three), behave))
    (left_out,) = summary["left_out"]
    assert (left_out["site"], left_out["round"], left_out["phase"]) == ("north", 2, "train")
    assert reason in left_out["reason"]
    assert [event["updates"] for event in federation.events("round")] == [3, 2, 3]
    attacked = federation.weights()

    def silent(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind, round) == ("north", "train", 2):
            return Message(Error(int(SiteError.TRAINING), ""), reply_to=request)
        return reply

    federation.folder = federation.folder.with_name("without")
    federation.run(federation.sites(dict(three), silent))
    assert federation.weights() == attacked


def test_an_update_sent_again_is_refused_even_after_a_resume(federation: Any, three: dict[int, str]) -> None:
    first_update: dict[str, Any] = {}

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if site == "north" and kind == "train":
            own = from_records(reply.content, ModelUpdate)
            first_update.setdefault("arrays", own.arrays)
            replayed = own.model_copy(update={"arrays": first_update["arrays"]})
            reply.content = to_records(replayed, PrivacyStatement(site=site, round=round))
            if round == 3 and not first_update.get("stopped"):
                first_update["stopped"] = True
                raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federation.run(federation.sites(dict(three), behave))
    summary = federation.run(federation.sites(three, behave), resume=True)
    assert [(item["site"], item["round"]) for item in summary["left_out"]] == [("north", 2), ("north", 3)]
    assert all("replayed" in item["reason"] for item in summary["left_out"])
    assert [event["updates"] for event in federation.events("round")] == [3, 2, 2]


def test_a_refused_update_s_statement_is_kept_for_its_budget_is_spent(
    federation: Any, three: dict[int, str]
) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind) == ("north", "train"):
            first(with_one(np.nan))(reply)
            own = from_records(reply.content, PrivacyStatement).model_copy(
                update={"epsilon": 0.5 * round, "delta": 1e-4}
            )
            reply.content["privacy"] = to_records(own)["privacy"]
        return reply

    summary = federation.run(federation.sites(three, behave))
    assert len(summary["left_out"]) == 3
    assert summary["statements"]["north"]["epsilon"] == 1.5


def test_hostile_releases_leave_the_site_out(federation: Any, three: dict[int, str]) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if kind == "query.proportions" and site == "north":
            reply.content["release"] = ConfigRecord({"json": '{"site": "north"}'})
        if kind == "query.proportions" and site == "south":
            reply.content["images"] = ConfigRecord({"json": "{}"})
        return reply

    summary = federation.run(federation.sites(three, behave), quorum=1)
    assert summary["sites"] == 1
    assert [item["site"] for item in summary["left_out"]] == ["node 12", "node 13"]
    assert all("unreadable release" in item["reason"] for item in summary["left_out"])
