"""The three records survive the way through Flower's records, and nothing else does."""

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from common.privacy.randomness import Generator
from common.records import MessageError, ModelUpdate, PrivacyStatement, ProportionRelease
from common.wire import check_only, from_records, to_records

RELEASE = ProportionRelease(
    site="north",
    data_version="abc",
    hierarchy={"levels": ["kind"], "rows": [["a"], ["b"]]},
    granularity="total",
    leaf_counts=((3.0, 5.0),),
    bags=2,
    bag_sizes=(),
    mechanism="exact",
    event={},
)
STATEMENT = PrivacyStatement(site="north", round=3)

arrays = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6, width=32)),
    max_size=3,
)
metrics = st.dictionaries(
    st.text("xyz.", min_size=1, max_size=8),
    st.one_of(
        st.integers(-(2**40), 2**40),
        st.floats(-1e9, 1e9),
        st.lists(st.integers(-9, 9), min_size=1, max_size=3).map(tuple),
        st.lists(st.floats(-9, 9), min_size=1, max_size=3).map(tuple),
    ),
    max_size=3,
)


def over_the_wire(records: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(records))


@given(arrays, metrics)
def test_an_update_survives_the_wire(arrays: dict, metrics: dict) -> None:
    update = ModelUpdate(sender="north", round=3, arrays=arrays, metrics=metrics)
    back = from_records(over_the_wire(to_records(update, STATEMENT)), ModelUpdate)
    assert (back.sender, back.round, back.metrics) == ("north", 3, metrics)
    assert back.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(back.arrays[name], array)


def test_all_arrays_of_an_update_travel_as_one() -> None:
    """Flower asks for each array on its own, on every leg of the way."""
    arrays = {str(number): np.full((2, number), number, np.float32) for number in range(60)}
    records = to_records(ModelUpdate(sender="north", round=3, arrays=arrays))
    assert [len(record) for record in records.array_records.values()] == [1]
    assert len(get_all_nested_objects(records)) <= 8


def test_releases_and_statements_survive_the_wire() -> None:
    assert from_records(over_the_wire(to_records(RELEASE)), ProportionRelease) == RELEASE
    assert from_records(over_the_wire(to_records(STATEMENT)), PrivacyStatement) == STATEMENT
    assert RELEASE.tree().sizes == (2,)
    total = RELEASE.total()
    assert total is not None
    assert total.tolist() == [3.0, 5.0]
    assert not RELEASE.is_private


def test_records_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        STATEMENT.round = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PrivacyStatement(site="north", round="3")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        PrivacyStatement(site="north", round=3, patient="x")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="must be float32"):
        ModelUpdate(sender="north", round=1, arrays={"w": np.zeros(2)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        (RecordDict(), "missing or malformed"),
        (RecordDict({"release": ConfigRecord({"json": "{}", "more": "x"})}), "missing or malformed"),
        (RecordDict({"release": ConfigRecord({"json": "{}"})}), "Field required"),
    ],
)
def test_malformed_records_are_named(records: RecordDict, fault: str) -> None:
    with pytest.raises(MessageError, match=fault):
        from_records(records, ProportionRelease)


def test_other_dtypes_and_missing_records_are_refused() -> None:
    good = to_records(ModelUpdate(sender="north", round=1, arrays={"w": np.zeros(2, np.float32)}))
    good["arrays"] = ArrayRecord({"arrays": Array(np.zeros(2))})
    with pytest.raises(MessageError, match="float64"):
        from_records(good, ModelUpdate)
    good["arrays"] = ArrayRecord()
    with pytest.raises(MessageError, match="malformed"):
        from_records(good, ModelUpdate)
    good = to_records(ModelUpdate(sender="north", round=1))
    del good["metrics"]
    with pytest.raises(MessageError, match="metrics"):
        from_records(good, ModelUpdate)


def test_any_further_record_is_refused() -> None:
    records = to_records(ModelUpdate(sender="north", round=1), STATEMENT)
    check_only(records, ModelUpdate, PrivacyStatement)
    records["labels"] = MetricRecord({"label": 1})
    with pytest.raises(MessageError, match="labels"):
        check_only(records, ModelUpdate, PrivacyStatement)


@pytest.mark.parametrize(
    ("record", "kind", "fields"),
    [
        ("privacy", PrivacyStatement, {"site": "north", "round": 2}),
        ("update", ModelUpdate, {"sender": "north", "round": 2, "shapes": {}}),
        ("release", ProportionRelease, json.loads(RELEASE.model_dump_json())),
    ],
)
def test_a_text_of_100_megabytes_is_refused_before_it_is_parsed(
    record: str, kind: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but its length is looked at: neither parser sees it, and none of it is in the refusal."""
    text = json.dumps({**fields, "generator": "y" * 100_000_000})
    records = RecordDict({record: ConfigRecord({"json": text})})

    def parse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the text was parsed")

    monkeypatch.setattr(json, "loads", parse)
    monkeypatch.setattr(kind, "model_validate_json", parse)
    with pytest.raises(MessageError, match="characters, at most") as refusal:
        from_records(records, kind)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("text", ["y" * 1_000_000, "os-urandom", "\x1b[2J", "; ".join([Generator.AES] * 2)])
def test_a_generator_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        PrivacyStatement(site="north", round=1, generator=text)
