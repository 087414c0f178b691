"""Find out from their run folders which cells are done, which are resumed and which must run anew.

A cell is done when its folder holds a result and an order with the same identity. The identity holds by name
everything that the figures depend on, so that the message can name what changed. The module starts nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError

from common.config import Scalar
from deploy.compare.cell import ORDER, RESULT, Order
from deploy.compare.cells import WEIGHTS, Cell

PLACES = ("run-dir", "sites-dir", "resume", "name", "train.device")
"""Keys that say where and how a run is done, not what it computes; of the weights file the name counts, once
there is a result."""
DIFFERENCES_TOLD = 3

Identity = dict[str, Scalar | None]


class State(StrEnum):
    """Name what a cell's folder holds."""

    DONE = "done"
    STOPPED = "stopped"
    """An order with the same identity, without a result: it goes on from its checkpoint."""
    CHANGED = "changed"
    """The run of another configuration."""
    NEW = "new"


@dataclass(frozen=True)
class Planned:
    """Hold a cell, its run folder and the state of that folder."""

    cell: Cell
    run: Path
    identity: Identity
    digest: str
    """Of the data."""
    state: State
    differences: tuple[str, ...] = ()
    """Why it is CHANGED: ``key: was A, is B``."""


def plan(cell: Cell, runs: Path, digest: str) -> Planned:
    """Return a cell with the state of its folder below ``runs``.

    Args:
        cell: the cell.
        runs: the folder of all run folders.
        digest: of the data.
    """
    run, now = runs / cell.name, identity(cell, digest)
    if not run.exists():
        return Planned(cell, run, now, digest, State.NEW)
    try:
        before = Order.load(run)
    except (OSError, ValidationError):
        return Planned(cell, run, now, digest, State.CHANGED, (f"it holds no readable {ORDER}",))
    if different := differences(before.identity, now):
        return Planned(cell, run, now, digest, State.CHANGED, different)
    if (run / RESULT).exists():
        return Planned(cell, run, now, digest, State.DONE)
    # A checkpoint lacks the weights that are not trained: a run can be resumed with its first weights only.
    places = {WEIGHTS: before.config.get(WEIGHTS)}, {WEIGHTS: cell.config.to_flat()[WEIGHTS]}
    moved = differences(*places)
    return Planned(cell, run, now, digest, State.CHANGED if moved else State.STOPPED, moved)


def identity(cell: Cell, digest: str) -> Identity:
    """Return everything that the cell's figures depend on, except the code."""
    config = {key: value for key, value in cell.config.to_flat().items() if key not in PLACES}
    # A weights file may be moved to another folder, so its name counts and its path does not.
    config[WEIGHTS] = Path(str(config[WEIGHTS])).name
    division = {f"data.{key}": value for key, value in asdict(cell.division).items()}
    return {**config, **division, "data.digest": digest, "setting": cell.setting.value, "site": cell.site}


def differences(before: Mapping[str, Scalar | None], now: Mapping[str, Scalar | None]) -> tuple[str, ...]:
    """Return the entries that differ, each as a text with its value before and now.

    A key that only one of the two has counts as a difference, because its default may not be what older code
    did.
    """
    return tuple(
        f"{key}: was {_value(before, key)}, is {_value(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if _value(before, key) != _value(now, key)
    )


def _value(identity: Mapping[str, Scalar | None], key: str) -> str:
    return json.dumps(identity[key]) if key in identity else "unknown"


def told(found: tuple[str, ...]) -> str:
    """Return the first differences as one line of text."""
    more = len(found) - DIFFERENCES_TOLD
    return "; ".join(found[:DIFFERENCES_TOLD]) + (f"; and {more} more" if more > 0 else "")
