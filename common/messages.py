"""Define the records that cross the network and translate them into Flower records and back.

A ProportionRelease goes from a site to the server once per data version. A ModelUpdate goes both ways. A
PrivacyStatement goes from a site to the server with every update. With secure aggregation a MaskedUpdate
takes the place of a site's ModelUpdate, and the other records of ``common.secure_aggregation.records`` go
before and after it. Nothing else may travel. This is the only module that builds or reads Flower records.
"""

import io
import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from common.config_tables import Transport
from common.errors import DataError, RunError
from common.hierarchy import Hierarchy
from common.privacy.events import event_from_dict
from common.record import Record as Record
from common.record import Round, SiteName, check_json
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
from common.text import one_line

FloatArray = NDArray[np.float32]
T = TypeVar("T", bound="Record")
Metric = int | float | tuple[int, ...] | tuple[float, ...]
SUPPRESSED = -1
"""Stands for a count of test images that is above 0 and below the site's smallest cell."""
SMALLEST_CELL = "confusion.smallest-cell"
"""The metric beside confusion counts that says so: the least count, above 0, that is shown."""
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Event = Annotated[
    dict[str, float | str], Field(max_length=5), AfterValidator(lambda event: _known_event(event))
]
"""A DP event of a kind that is accounted for (common/privacy/events.py)."""

_JSON = "json"
_ARRAYS, _METRICS = "arrays", "metrics"
_WORDS = "words"
_TRANSPORTED = frozenset(transport.value for transport in Transport)
_LARGEST_HALF = float(np.finfo(np.float16).max)


class SiteError(IntEnum):
    """List the error codes that a site sends.

    Flower's own codes are below 1000.
    """

    EGRESS = 1001
    DATA = 1002
    CONFIGURATION = 1003
    TRAINING = 1004
    INTERNAL = 1005
    BUDGET = 1006
    """The site's privacy budget does not allow what was asked: it leaves the run."""
    SECURE_AGGREGATION = 1007
    """The site does not go on with a secure aggregation: what it was told is not what it can trust."""
    ROUND_TAKEN = 1008
    """The site's part of this round is done; the run goes on with the next round."""
    QUESTION = 1009
    """The site answers no such question."""
    UNANSWERED = 1010
    """In a private run, whatever else failed at the site: which it was may depend on private data."""


# A site sends only these fixed texts, because the text of an exception can carry a path or a patient id.
SITE_ERRORS: Mapping[SiteError, str] = {
    SiteError.EGRESS: "the site's guard refused to send the reply",
    SiteError.DATA: "the site's data cannot be used: `fedbags site check` at the site lists bad rows; a data "
    "version that its privacy ledger does not know is accepted with `fedbags ledger accept-version`",
    SiteError.CONFIGURATION: "the run or site configuration is faulty at the site",
    SiteError.TRAINING: "local training failed at the site (diverged or could not go on)",
    SiteError.INTERNAL: "an unexpected error at the site",
    SiteError.BUDGET: "the site's privacy budget does not allow this; the site leaves the run",
    SiteError.SECURE_AGGREGATION: "the site refused to go on with the secure aggregation; its log says why",
    SiteError.ROUND_TAKEN: "the site has done its part of this round's sum already, or begun the round with "
    "another model; it takes part in the next round",
    SiteError.QUESTION: "the site does not answer such a question",
    SiteError.UNANSWERED: "the site could not answer: its log says why, and `fedbags site check` at the site "
    "lists bad rows; a data version that its privacy ledger does not know is accepted with "
    "`fedbags ledger accept-version`",
}
"""What each code means. A site sends this text and no other, and a server writes down this text whatever
came with the code: the text of an exception can carry a path or a patient id."""


class MessageError(ValueError):
    """Report a Flower record that does not meet the contract of this module.

    The text holds names of records and keys, dtypes and shapes only. Names can come from another party, so
    the text is short and printable whatever they are.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def _known_event(event: dict[str, float | str]) -> dict[str, float | str]:
    event_from_dict(event)
    return event


# A tree of millions of names would fill the server's memory and its error texts.
MOST_LEVELS, MOST_LEAVES = 20, 20_000


def _label_tree(data: dict[str, Any]) -> dict[str, Any]:
    """Refuse everything but a label tree of a size that can be handled."""
    levels, rows = data.get("levels"), data.get("rows")
    if data.keys() != {"levels", "rows"} or not isinstance(levels, list) or not isinstance(rows, list):
        raise ValueError("a label tree has levels and rows")
    if len(levels) > MOST_LEVELS or len(rows) > MOST_LEAVES:
        raise ValueError(f"a label tree has at most {MOST_LEVELS} levels and {MOST_LEAVES} leaves")
    if not all(
        isinstance(row, list) and all(isinstance(cell, str) for cell in row) for row in [levels, *rows]
    ):
        raise ValueError("the rows of a label tree are lists of names")
    try:
        Hierarchy.from_dict(data)
    except DataError as error:
        raise ValueError("no label tree whose leaves are all at one level, with names of one line") from error
    return data


class ProportionRelease(Record):
    """Hold the label counts that a site releases, once per data version.

    Only the finest level is sent; coarser counts are its sums, so the levels agree by construction.
    """

    site: SiteName
    data_version: str = Field(pattern=r"^[0-9A-Za-z-]{1,64}$")
    hierarchy: Annotated[dict[str, Any], AfterValidator(_label_tree)] = Field(
        description="Hierarchy.to_dict(): class names, no data"
    )
    granularity: Literal["none", "total", "per-bag"]
    leaf_counts: tuple[Annotated[tuple[Number, ...], Field(max_length=20_000)], ...] = Field(
        max_length=1_000_000,
        description="shape (0, C_L), (1, C_L) for the site total, or (bags, C_L); images",
    )
    bags: int = Field(ge=1, le=1_000_000, description="number of bags; not protected")
    bag_sizes: tuple[Annotated[int, Field(ge=1, le=10**9)], ...] = Field(
        max_length=1_000_000, description="images per bag, only when released per bag"
    )
    mechanism: Literal["none", "exact", "discrete-laplace"]
    event: Annotated[dict[str, float | str], Field(max_length=5)] = Field(
        description="the accounted DP event; empty when not private"
    )

    @model_validator(mode="after")
    def _is_what_it_says(self) -> Self:
        """Check the number of rows, whole counts, and an event exactly where there is noise."""
        rows = {"none": 0, "total": 1, "per-bag": self.bags}[self.granularity]
        if len(self.leaf_counts) != rows:
            raise ValueError(f"{len(self.leaf_counts)} rows of counts for {self.granularity}, not {rows}")
        if (self.mechanism == "none") != (rows == 0):
            raise ValueError("counts under mechanism 'none', or none under another")
        if len(self.bag_sizes) != (rows if self.granularity == "per-bag" else 0):
            raise ValueError("bag sizes leave with counts per bag, one for each, and else not at all")
        leaves, least = len(self.hierarchy["rows"]), 0.0 if self.mechanism == "exact" else -math.inf
        for row in self.leaf_counts:
            if len(row) != leaves or not all(value.is_integer() and value >= least for value in row):
                raise ValueError("a row of counts that is not one whole number for each leaf")
        if (self.mechanism == "discrete-laplace") != bool(self.event):
            raise ValueError("noise without its event, or an event without noise")
        if self.event:
            _known_event(self.event)
        return self

    @property
    def is_private(self) -> bool:
        """Return True if the counts carry calibrated noise or none were released."""
        return self.mechanism != "exact"

    def tree(self) -> Hierarchy:
        """Return the site's label tree."""
        return Hierarchy.from_dict(self.hierarchy)

    def total(self) -> NDArray[np.float64] | None:
        """Return the leaf counts of the whole site, shape (C_L,), or None when it releases none."""
        return np.sum(self.leaf_counts, axis=0, dtype=np.float64) if self.leaf_counts else None


def _read_only(arrays: Any) -> dict[str, FloatArray]:
    checked = {}
    for name, array in dict(arrays).items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise ValueError(f"array {name!r} must be float32")
        view = array.view()
        # A record is frozen, so its numbers must not change after they were checked either.
        view.flags.writeable = False
        checked[str(name)] = view
    return checked


def _plain(metrics: Any) -> dict[str, Metric]:
    """Refuse truth values, which Python takes for numbers."""
    for value in dict(metrics).values():
        if any(type(number) is bool for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("a metric is a number, or several")
    return dict(metrics)


ArrayName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.]+$")]
MetricName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[a-z0-9.-]+$")]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MetricValue = (
    Integer
    | float
    | Annotated[tuple[Integer, ...], Field(max_length=10**7)]
    | Annotated[tuple[float, ...], Field(max_length=10**7)]
)


class ModelUpdate(Record):
    """Hold model arrays and the metrics that policy allows, from server to site or back.

    The server sends every float array of the model, a site only the trainable ones. A metric is named
    ``name`` or ``name.detail``, where ``name`` is what a site's policy allows or withholds.
    """

    sender: SiteName = Field(description="a site's name, or 'server'")
    round: Round
    arrays: Annotated[dict[ArrayName, FloatArray], BeforeValidator(_read_only), Field(max_length=10_000)] = (
        Field(default={})
    )
    metrics: Annotated[dict[MetricName, MetricValue], BeforeValidator(_plain), Field(max_length=200)] = Field(
        default={}
    )

    @property
    def megabytes(self) -> float:
        """Return the size of the arrays in MiB."""
        return sum(array.nbytes for array in self.arrays.values()) / 2**20


# Flower asks for each array of a record on its own, on every leg of the way. With one for each of a model's
# 45 arrays and more, a round of a small model consisted mostly of requests.
class _Envelope(Record):
    """Hold a ModelUpdate without its numbers, which travel as one array in the order of ``shapes``."""

    sender: SiteName
    round: Round
    shapes: dict[ArrayName, Annotated[tuple[NonNegativeInt, ...], Field(max_length=8)]] = Field(
        max_length=10_000
    )


class PrivacyStatement(Record):
    """State the privacy budget that a site has spent so far, sent with every update."""

    site: SiteName
    round: Round
    unit: Literal["bag"] = "bag"
    adjacency: Literal["replace-one"] = "replace-one"
    epsilon: float | None = Field(None, ge=0, description="None: no bound holds (training is not private)")
    delta: float | None = Field(None, gt=0, lt=1)
    events: tuple[Event, ...] = Field((), max_length=5_000)
    budget_left: float | None = Field(None, ge=0, description="epsilon left under the site's cap")
    ledger_head: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    generator: Annotated[str, AfterValidator(lambda text: _known_generators(text))] = Field(
        "", max_length=500, description="every generator of sampling and noise so far, joined by '; '"
    )
    losses: int = Field(
        0, ge=0, le=1000, description="how often the site accepted that rows of its ledger were lost"
    )


def _known_generators(text: str) -> str:
    if text:
        from common.privacy.randomness import Generator  # a run in clear loads no cryptography

        named = text.split("; ")
        if len(set(named)) != len(named) or not set(named) <= set(Generator):
            raise ValueError("a generator that is none of the known ones, or one twice")
    return text


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


def from_records(records: RecordDict, kind: type[T]) -> T:
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


def remembered(state: RecordDict, name: str, kind: type[T]) -> T | None:
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
