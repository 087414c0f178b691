"""Save and load the state from which a run can go on, in one file per round.

It holds the model, the best model, the server optimiser and the server's state, which includes the privacy
statements. The state is one more array, of bytes: the header of a safetensors file, where a checkpoint of
0.1 has it, is limited to 100 MB, and what does not fit would end the run.

A checkpoint is written under a temporary name, synced and renamed, carries its own digest, and the one
before it is kept: a crash or a full disk while writing costs at most one round.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import RunError
from common.files import replacing
from common.records import PrivacyStatement, ProportionRelease
from common.run_records import BagFigures, DeclaredLoss, LeftOut

log = logging.getLogger("fedbags.server")

# The newest may turn out damaged, so the one before it stays.
_KEPT = 2
_MODEL, _BEST, _OPTIMISER = "model/", "best/", "optimiser/"
_STATE = "state"
"""The array of the state's JSON; in a checkpoint of 0.1, the entry of the header."""

_Arrays = Mapping[str, NDArray[Any]]


class ServerState(BaseModel):
    """Hold everything but arrays that the server knows after a round."""

    round: int = 0
    best_round: int = 0
    best_score: float | None = None
    seconds: float = 0.0
    releases: dict[str, ProportionRelease] = {}
    statements: dict[str, PrivacyStatement] = {}
    statement_keys: dict[str, str] = {}
    """Fingerprints of the keys of the nodes that made them, by site."""
    losses: list[DeclaredLoss] = []
    left_out: list[LeftOut] = []
    digests: dict[str, list[str]] = {}
    """Of the updates that each site sent, so that none is taken twice."""
    bags: list[BagFigures] = []
    skipped: int = 0
    """Rounds that left the model as it was."""
    expelled: dict[str, str] = {}
    """Sites that may take no further part in the run, and why: they cost it a sum of masked updates."""
    stopped_early: str = ""
    """Why the run ended before its last round, and well: its sites' privacy budgets are used up."""


def save(folder: Path, state: ServerState, model: _Arrays, best: _Arrays, optimiser: _Arrays) -> Path:
    """Write ``round-NNNNN.safetensors`` atomically and drop all but the newest two.

    Raises:
        RunError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{prefix}{name}": np.ascontiguousarray(array)
        for prefix, group in ((_MODEL, model), (_BEST, best), (_OPTIMISER, optimiser))
        for name, array in group.items()
    }
    text = state.model_dump_json().encode()
    target = folder / f"round-{state.round:05d}.safetensors"
    try:
        whole = {**arrays, _STATE: np.frombuffer(text, np.uint8)}
        for left in folder.glob("*.partial"):  # by a server that was killed in the middle of writing one
            left.unlink()
        with replacing(target) as (partial,):
            save_file(whole, partial, metadata={"digest": _digest(arrays, text)})
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the checkpoint of round {state.round} could not be written to {folder}: {error}\n"
            "The one before it is intact: free some space and go on with --resume."
        ) from error
    # Files of later rounds, left by a run that was resumed from an earlier checkpoint, do not count as the
    # newest.
    older = [path for path in folder.glob("round-*.safetensors") if path.name <= target.name]
    for old in sorted(older)[:-_KEPT]:
        old.unlink()
    return target


def load_newest(
    folder: Path, damaged: Callable[[str, str], None] = lambda file, reason: None
) -> tuple[ServerState, dict[str, dict[str, NDArray[Any]]]] | None:
    """Return the newest intact checkpoint, or None where there is none.

    Args:
        folder: where ``save`` put them.
        damaged: called with the name and the fault of every newer checkpoint that is passed over.

    Returns:
        The state, and the arrays of ``model``, ``best`` and ``optimiser`` by name.

    Raises:
        RunError: checkpoints are there but none is intact.
    """
    paths = sorted(folder.glob("round-*.safetensors"), reverse=True)
    for path in paths:
        try:
            return _load(path)
        except (OSError, ValueError, SafetensorError) as error:
            damaged(path.name, str(error))
            log.warning(
                "checkpoint %(file)s is damaged (%(error)s); trying the one before it",
                {"file": path.name, "error": type(error).__name__},
            )
    if paths:
        raise RunError(
            f"no intact checkpoint among {[path.name for path in paths]} in {folder}\n"
            "Put back a copy of that folder from a backup, or start a new run in another folder."
        )
    return None


def _load(path: Path) -> tuple[ServerState, dict[str, dict[str, NDArray[Any]]]]:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    stored = arrays.pop(_STATE, None)
    text = metadata.get(_STATE, "").encode() if stored is None else stored.tobytes()
    # safetensors checks the header only; a bit that flipped in an array would otherwise go into the model.
    if metadata.get("digest") != _digest(arrays, text):
        raise ValueError("its digest does not match its content")
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for prefix in (_MODEL, _BEST, _OPTIMISER):
        groups[prefix.rstrip("/")] = {
            key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
        }
    return ServerState.model_validate_json(text), groups


def _digest(arrays: _Arrays, text: bytes) -> str:
    digest = hashlib.sha256(text)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
