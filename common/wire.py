"""Translate the records into Flower's and back; no other module reads or writes the content of a message."""

import io
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, ValidationError

from common.config_tables import Transport
from common.errors import RunError
from common.records import (
    ArrayName,
    FloatArray,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    Record,
    Round,
    SiteName,
    check_json,
)
from common.secure_aggregation.records import (
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
    Words,
)

_T = TypeVar("_T", bound=Record)

_JSON = "json"
_ARRAYS, _METRICS = "arrays", "metrics"
_WORDS = "words"
_TRANSPORTED = frozenset(transport.value for transport in Transport)
_LARGEST_HALF = float(np.finfo(np.float16).max)


# Flower asks for each array of a record on its own, on every leg of the way. With one for each of a model's
# 45 arrays and more, a round of a small model consisted mostly of requests.
class _Envelope(Record):
    """Hold a ModelUpdate without its numbers, which travel as one array in the order of ``shapes``."""

    sender: SiteName
    round: Round
    shapes: dict[ArrayName, Annotated[tuple[NonNegativeInt, ...], Field(max_length=8)]] = Field(
        max_length=10_000
    )


_RECORD_NAMES: Mapping[type[Record], str] = {
    ProportionRelease: "release",
    ModelUpdate: "update",
    PrivacyStatement: "privacy",
    SessionOffer: "session-offer",
    KeyAdvert: "key-advert",
    SessionPlan: "session-plan",
    SealedShares: "sealed-shares",
    MaskRequest: "mask-request",
    MaskedUpdate: "masked-update",
    SurvivorList: "survivor-list",
    SurvivorSignature: "survivor-signature",
    UnmaskRequest: "unmask-request",
    UnmaskShares: "unmask-shares",
}
_MOST_TEXT: Mapping[type[Record], int] = {
    ProportionRelease: 2**24,
    SessionPlan: 2**24,
    ModelUpdate: 2**22,
    SealedShares: 2**22,
    MaskRequest: 2**22,
    UnmaskRequest: 2**22,
    SurvivorList: 2**22,
    UnmaskShares: 2**22,
}
_MOST_TEXT_OF_OTHERS = 2**20
"""Characters of a record's JSON that are read at all: what is longer is refused before it is parsed."""


def size(records: RecordDict) -> int:
    """Return the bytes that the records hold, before the transport's own framing."""
    return sum(record.count_bytes() for record in records.values())


def to_records(*messages: Record, transport: Transport = Transport.FLOAT32) -> RecordDict:
    """Translate records into one Flower RecordDict, which ``from_records`` reads.

    Args:
        messages: at most one of each kind.
        transport: number format of the arrays of a ModelUpdate. ``float16`` rounds them; everything else
            comes back unchanged.

    Raises:
        RunError: an array has a value that the transport cannot hold.
    """
    records = RecordDict()
    for message in messages:
        name = _RECORD_NAMES[type(message)]
        if isinstance(message, ModelUpdate):
            # One Flower array holds all of the model's: see _Envelope.
            packed = {_ARRAYS: Array(_pack(message.arrays, transport))} if message.arrays else {}
            records[_ARRAYS] = ArrayRecord(packed)
            records[_METRICS] = MetricRecord(
                {key: list(v) if isinstance(v, tuple) else v for key, v in message.metrics.items()}
            )
            shapes = {key: array.shape for key, array in message.arrays.items()}
            text = _Envelope(sender=message.sender, round=message.round, shapes=shapes).model_dump_json()
        else:
            if isinstance(message, MaskedUpdate):
                records[_WORDS] = ArrayRecord({_WORDS: Array(message.vector)})
            text = message.model_dump_json()
        records[name] = ConfigRecord({_JSON: text})
    return records


def from_records(records: RecordDict, kind: type[_T]) -> _T:
    """Read one record of ``kind`` out of a Flower RecordDict.

    Raises:
        MessageError: the record is missing, or a key, dtype or shape is not one of the contract.
    """
    name = _RECORD_NAMES[kind]
    config = records.config_records.get(name)
    if config is None or list(config) != [_JSON] or not isinstance(config[_JSON], str):
        raise MessageError(f"record {name!r} is missing or malformed")
    try:
        # The text is bounded and checked before pydantic parses it: it comes from another party.
        text = check_json(str(config[_JSON]), _MOST_TEXT.get(kind, _MOST_TEXT_OF_OTHERS))
        if kind is MaskedUpdate:
            masked = MaskedUpdate.model_validate_json(text)
            return kind.model_validate({**masked.model_dump(), "vector": _decode_words(records)})
        if kind is not ModelUpdate:
            return kind.model_validate_json(text)
        head = _Envelope.model_validate_json(text)
        arrays = _unpack(records, head.shapes)
        metrics = {
            key: tuple(v) if isinstance(v, list) else v for key, v in records.metric_records[_METRICS].items()
        }
        return kind.model_validate(
            {"sender": head.sender, "round": head.round, "arrays": arrays, "metrics": metrics}
        )
    except KeyError as error:
        raise MessageError(f"record {error} is missing") from None
    except ValidationError as error:
        # The faulty input is left out of the text: at a site it could be data.
        found = error.errors(include_url=False, include_context=False, include_input=False)[:5]
        faults = ", ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in found)
        raise MessageError(f"record {name!r}: {faults}") from None
    except MessageError:
        raise
    except ValueError as error:
        raise MessageError(f"record {name!r}: {error}") from None


def combine(*parts: RecordDict) -> RecordDict:
    """Return one RecordDict with the records of several.

    Arrays are shared, not copied.
    """
    return RecordDict({name: record for part in parts for name, record in part.items()})


def remember(state: RecordDict, name: str, record: Record) -> None:
    """Put a record into a node's own state (``Context.state``), which never travels to the server."""
    state[name] = ConfigRecord({_JSON: record.model_dump_json()})


def remembered(state: RecordDict, name: str, kind: type[_T]) -> _T | None:
    """Return the record that was last remembered under the name, or None."""
    config = state.config_records.get(name)
    return None if config is None else kind.model_validate_json(str(config[_JSON]))


def check_only(records: RecordDict, *kinds: type[Record]) -> None:
    """Raise MessageError unless the RecordDict holds exactly the records of these kinds."""
    expected = {_RECORD_NAMES[kind] for kind in kinds}
    if ModelUpdate in kinds:
        expected |= {_ARRAYS, _METRICS}
    if MaskedUpdate in kinds:
        expected.add(_WORDS)
    if set(records) != expected:
        raise MessageError(f"records {sorted(expected)} expected, got {sorted(records)}")


def _encode(name: str, array: FloatArray, transport: Transport) -> NDArray[Any]:
    if transport is Transport.FLOAT32:
        return array
    # IEEE half precision rather than bfloat16: weights lie far inside its range, and its 11 bits keep the
    # small change of one round, which the 8 bits of bfloat16 would round away.
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(array).any():
        raise RunError(
            f"array {name!r} has a value beyond {_LARGEST_HALF:g}, the largest that 16 bits hold: "
            "use federation.transport = 'float32' for this model"
        )
    return half


def _pack(arrays: Mapping[str, FloatArray], transport: Transport) -> NDArray[Any]:
    """Return all numbers as one vector, in the transport's dtype."""
    return np.concatenate([_encode(name, array, transport).ravel() for name, array in arrays.items()])


def _unpack(records: RecordDict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FloatArray]:
    """Return the named arrays in 32 bits as views of one vector, whichever transport they came by."""
    if not shapes and not records.array_records[_ARRAYS]:
        return {}
    array = _only_array(records, _ARRAYS)
    if array.dtype not in _TRANSPORTED or array.stype != "numpy.ndarray":
        raise MessageError(f"arrays of dtype {array.dtype}, float32 or float16 expected")
    values = _values(_ARRAYS, array)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if values.shape != (sum(sizes),):
        raise MessageError(f"{sum(sizes)} numbers are named, but an array of shape {values.shape} came")
    values = values if values.dtype == np.float32 else values.astype(np.float32)
    ends = np.cumsum([0, *sizes])
    return {
        name: values[start : start + size].reshape(shape)
        for (name, shape), start, size in zip(shapes.items(), ends[:-1], sizes, strict=True)
    }


def _decode_words(records: RecordDict) -> Words:
    array = _only_array(records, _WORDS)
    if array.dtype != "uint32" or array.stype != "numpy.ndarray" or len(array.shape) != 1:
        raise MessageError(
            f"masked words of dtype {array.dtype} and shape {array.shape}, (n,) uint32 expected"
        )
    return _values(_WORDS, array)


def _only_array(records: RecordDict, name: str) -> Array:
    """Return the one array of the record of this name."""
    arrays = records.array_records[name]
    if list(arrays) != [name]:
        raise MessageError(f"record {name!r} is malformed")
    return arrays[name]


def _values(name: str, array: Array) -> NDArray[Any]:
    stream = io.BytesIO(array.data)
    try:
        # Pickled arrays would run code of the sender.
        values: NDArray[Any] = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
        raise MessageError(f"array {name!r} cannot be read ({type(error).__name__})") from None
    # Bytes behind the array would be a way to smuggle data past the site's guard.
    if stream.read(1):
        raise MessageError(f"array {name!r} is followed by further bytes")
    # The header inside the bytes and Flower's own fields must agree, or checks on one would miss the other.
    if values.dtype != array.dtype or values.shape != tuple(array.shape):
        raise MessageError(f"array {name!r} is not of the dtype and shape that it says")
    return values
