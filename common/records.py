"""Define the records that cross the network, as frozen and strict pydantic models.

A ProportionRelease goes from a site to the server once per data version. A ModelUpdate goes both ways. A
PrivacyStatement goes from a site to the server with every update. With secure aggregation a MaskedUpdate
takes the place of a site's ModelUpdate, and the other records of ``common.secure_aggregation.records`` go
before and after it. Nothing else may travel. Records accept no undeclared field. Every text has a pattern
and a length, every number a range, so that no record can fill a memory or deceive a terminal. This module
knows nothing of Flower: ``common.wire`` translates.
"""

import json
import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common.errors import DataError
from common.hierarchy import Hierarchy
from common.privacy.events import event_from_dict
from common.text import one_line

_SITE_NAME = r"^[A-Za-z0-9._-]+$"
SiteName = Annotated[str, Field(min_length=1, max_length=100, pattern=_SITE_NAME)]
"""The name of a site, as in site.toml: nothing that a terminal or a file system could take for more."""
Round = Annotated[int, Field(ge=0, le=10**9)]
"""A round's number; 0 is before the first."""
MOST_SITES = 10_000
"""Sites that one record can speak of."""
FloatArray = NDArray[np.float32]
Metric = int | float | tuple[int, ...] | tuple[float, ...]
SUPPRESSED = -1
"""Stands for a count of test images that is above 0 and below the site's smallest cell."""
SMALLEST_CELL = "confusion.smallest-cell"
"""The metric beside confusion counts that says so: the least count, above 0, that is shown."""
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]
_Event = Annotated[
    dict[str, float | str], Field(max_length=6), AfterValidator(lambda event: _known_event(event))
]
"""A DP event of a kind that is accounted for (common/privacy/events.py)."""


class Record(BaseModel):
    """Serve as the frozen and strict base of the records.

    Bytes travel as base64 in JSON.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )


def check_json(text: str, most: int) -> str:
    """Return a JSON text if it is short enough and no object in it has a key twice.

    Args:
        text: from another party.
        most: characters that are read at all.

    Raises:
        ValueError: it is longer, no JSON, nested too deep, or has a key twice; none of it is in the message.
    """
    # The length is checked before parsing, so that a sender cannot make the reader spend memory on it.
    if len(text) > most:
        raise ValueError(f"a text of {len(text)} characters, at most {most} are read")
    try:
        # A repeated key would mean one thing to this reader and another to a parser that keeps the first
        # value.
        json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    except json.JSONDecodeError:
        raise ValueError("no JSON") from None
    return text


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON with a key twice")
    return found


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
    """Report a record that does not meet its contract.

    The text holds names of records and keys, dtypes and shapes only. Names can come from another party, so
    the text is short and printable whatever they are.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def _known_event(event: dict[str, float | str]) -> dict[str, float | str]:
    event_from_dict(event)
    return event


# A tree of millions of names would fill the server's memory and its error texts.
_MOST_LEVELS, _MOST_LEAVES = 20, 20_000


def _label_tree(data: dict[str, Any]) -> dict[str, Any]:
    """Refuse everything but a label tree of a size that can be handled."""
    levels, rows = data.get("levels"), data.get("rows")
    if data.keys() != {"levels", "rows"} or not isinstance(levels, list) or not isinstance(rows, list):
        raise ValueError("a label tree has levels and rows")
    if len(levels) > _MOST_LEVELS or len(rows) > _MOST_LEAVES:
        raise ValueError(f"a label tree has at most {_MOST_LEVELS} levels and {_MOST_LEAVES} leaves")
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
    leaf_counts: tuple[Annotated[tuple[_Number, ...], Field(max_length=20_000)], ...] = Field(
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
    def _parts_agree(self) -> Self:
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
_MetricName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[a-z0-9.-]+$")]
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_MetricValue = (
    _Integer
    | float
    | Annotated[tuple[_Integer, ...], Field(max_length=10**7)]
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
    metrics: Annotated[dict[_MetricName, _MetricValue], BeforeValidator(_plain), Field(max_length=200)] = (
        Field(default={})
    )

    @property
    def megabytes(self) -> float:
        """Return the size of the arrays in MiB."""
        return sum(array.nbytes for array in self.arrays.values()) / 2**20


class PrivacyStatement(Record):
    """State the privacy budget that a site has spent so far, sent with every update."""

    site: SiteName
    round: Round
    unit: Literal["bag"] = "bag"
    adjacency: Literal["replace-one"] = "replace-one"
    epsilon: float | None = Field(None, ge=0, description="None: no bound holds (training is not private)")
    epsilon_alone: float | None = Field(
        None, ge=0, description="by the site's own shares of noise alone; None: no noise was shared"
    )
    delta: float | None = Field(None, gt=0, lt=1)
    events: tuple[_Event, ...] = Field((), max_length=5_000)
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
