"""The base of everything that crosses the network: frozen, strict, and no field that is not declared.

Knows nothing of Flower and of what the records mean.
"""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of the records. Bytes travel as base64 in JSON."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )
