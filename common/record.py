"""Define the base class of all records that cross the network.

Records are frozen and strict and accept no undeclared field. Every text has a pattern and a length, every
number a range, so that no record can fill a memory or deceive a terminal. This module knows nothing of
Flower and of what the records mean.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SITE_NAME = r"^[A-Za-z0-9._-]+$"
SiteName = Annotated[str, Field(min_length=1, max_length=100, pattern=SITE_NAME)]
"""The name of a site, as in site.toml: nothing that a terminal or a file system could take for more."""
Round = Annotated[int, Field(ge=0, le=10**9)]
"""A round's number; 0 is before the first."""
MOST_SITES = 10_000
"""Sites that one record can speak of."""


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
