"""What of a site's reply may be used: the right sender and round, arrays like the model's, sane values.

Pure checks of one reply; what a refusal leads to is decided in rounds.py. They stop the accidents and the
crude attacks (NaN, infinity, absurd values, other shapes, another site's name, an update sent before).
A site that lies within these bounds is the business of the robust strategies (aggregation.py).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from common.config_tables import FederationConfig
from common.messages import (
    FloatArray,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    check_only,
    from_records,
)

Arrays = Mapping[str, FloatArray]


def read_update(
    content: RecordDict, site: str, round: int, *, private: bool
) -> tuple[ModelUpdate, PrivacyStatement | None]:
    """Read a reply that ``site`` was asked for in ``round``.

    Args:
        content: what came back.
        site: the name of the node that was asked.
        round: the round that it was asked for; a late reply to an earlier one is refused.
        private: a privacy statement comes with the update.

    Raises:
        MessageError: a record is missing, malformed or too many, or speaks for another site or round.
    """
    try:
        check_only(content, ModelUpdate, *([PrivacyStatement] if private else []))
        update = from_records(content, ModelUpdate)
        statement = from_records(content, PrivacyStatement) if private else None
    except MessageError as error:
        raise MessageError(f"unreadable reply: {error}") from None
    if update.sender != site or update.round != round:
        raise MessageError(f"reply of {update.sender!r} for round {update.round}")
    if statement is not None and (statement.site != site or statement.round != round):
        raise MessageError(f"privacy statement of {statement.site!r} for round {statement.round}")
    return update, statement


def fault_of(update: ModelUpdate, reference: Arrays, config: FederationConfig) -> str:
    """Why an update cannot be used, or an empty text.

    Args:
        update: what a site sent.
        reference: the trainable arrays of the current model; names and shapes must match.
        config: ``max_update_mb``, largest total size, MiB; ``max_change``, largest L2 norm of the change
            relative to 1 + the norm of the model.
    """
    if update.megabytes > config.max_update_mb:
        return f"oversized update: {update.megabytes:.1f} MiB, at most {config.max_update_mb:g} allowed"
    if update.arrays.keys() != reference.keys():
        odd = sorted(update.arrays.keys() ^ reference.keys())
        return f"array names differ from the model's: {odd[:5]}"
    for name, array in update.arrays.items():
        if array.shape != reference[name].shape:
            return f"array {name!r} has shape {array.shape}, {reference[name].shape} expected"
        if not np.isfinite(array).all():
            return f"array {name!r} holds NaN or infinity"
    weight = update.metrics.get("num-bags")
    if not isinstance(weight, int) or weight < 1:
        return "metric 'num-bags' must be a positive integer"
    change = _norm(
        np.subtract(update.arrays[name], array, dtype=np.float64) for name, array in reference.items()
    )
    limit = config.max_change * (1.0 + _norm(reference.values()))
    if change > limit:
        return f"the model would change by {change:.3g} (L2 norm), at most {limit:.3g} allowed (max-change)"
    return ""


def is_replay(update: ModelUpdate, seen: dict[str, list[str]]) -> bool:
    """Whether the site sent these very arrays before; adds their digest to ``seen[site]``.

    Honest training never does: every round starts from another model.
    """
    digest = hashlib.sha256()
    for name in sorted(update.arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(update.arrays[name]).data)
    short = digest.hexdigest()[:32]
    before = seen.setdefault(update.sender, [])
    if short in before:
        return True
    before.append(short)
    return False


def _norm(arrays: Iterable[NDArray[Any]]) -> float:
    """L2 norm of all arrays together, in float64, one array in memory at a time."""
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays))
