"""Write and read the folder of one run so that a reader never sees half a file.

config.toml         the complete configuration; ``fedbags simulate --config`` repeats the run
metrics.jsonl       one event a line: joined, waiting, enrolled, phase, update, statement, round,
                    round-skipped, left-out, left, ledger-lost, checkpoint-damaged, stopped-early, resumed,
                    failed, finished
checkpoints/        the state from which a run can go on, one file per round
model.safetensors   the selected model, with model.json beside it
summary.json        the figures of the finished run
confusion.json      pooled test confusion counts per level, for the pictures
log.jsonl           what the server logged

The events and the summary are the records of common/run_records.py. The code that ran is identified by the
package's version and, in a git checkout, its commit.

A checkpoint holds the model, the best model, the server optimiser and the server's state, which includes the
privacy statements. The state is one more array, of bytes: the header of a safetensors file, where a
checkpoint of 0.1 has it, is limited to 100 MB, and what does not fit would end the run. A checkpoint is
written under a temporary name, synced and renamed, carries its own digest, and the one before it is kept: a
crash or a full disk while writing costs at most one round.
"""

import errno
import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.config import RunConfig
from common.errors import RunError, UserError, writable
from common.files import read_json_lines, replacing, write_json, write_text
from common.records import PrivacyStatement, ProportionRelease
from common.run_records import BagFigures, DeclaredLoss, LeftOut, RunEvent, RunSummary
from common.text import JsonLines

if TYPE_CHECKING:  # torch and Flower come with it, and whoever watches a run needs neither
    from server.evaluation import Confusion

log = logging.getLogger("fedbags.server")

_MAY_CHANGE = (
    "run-dir", "sites-dir", "secure-aggregation.certificates", "federation.statements", "train.device",
    "federation.sites", "federation.deadline", "federation.enrol-deadline", "federation.patience",
)  # fmt: skip
"""Keys that say where, by whom and how patiently, not what is computed."""

_ROOT = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 10
# The newest may turn out damaged, so the one before it stays.
_KEPT_CHECKPOINTS = 2
_MODEL, _BEST, _OPTIMISER = "model/", "best/", "optimiser/"
_STATE = "state"
"""The array of the state's JSON; in a checkpoint of 0.1, the entry of the header."""
_Arrays = Mapping[str, NDArray[Any]]


class RunFolder:
    """Hold the paths and writers of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.confusion = path / "confusion.json"
        self.log = path / "log.jsonl"

    def open(self, config: RunConfig) -> None:
        """Create the folder for a new run, or check that it is the one to resume.

        Raises:
            UserError: see check; or the folder cannot be written.
        """
        self.check(config)
        with writable(f"the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, config.with_changes({"resume": False}).to_toml())

    def check(self, config: RunConfig) -> None:
        """Check that the folder is free, or holds the run to resume, and change nothing.

        Raises:
            UserError: it holds a run already, or (to resume) none or one of another configuration.
        """
        if config.resume:
            self._check_same_run(config)
        elif self.config.exists():
            raise UserError(
                f"the run folder exists: {self.path}\n"
                "Choose another with --out, or go on with that run with --resume."
            )

    def _check_same_run(self, config: RunConfig) -> None:
        if not self.config.exists():
            raise UserError(f"nothing to resume: {self.path} holds no run; leave --resume out")
        before = RunConfig.from_toml(self.config).to_flat()
        now = config.with_changes({"resume": False}).to_flat()
        changed = [key for key in now if now[key] != before[key] and key not in _MAY_CHANGE]
        if changed:
            lines = "\n".join(f"  {key}: was {before[key]!r}, is {now[key]!r}" for key in changed)
            raise UserError(
                f"--resume goes on with the same configuration, but these keys differ:\n{lines}\n"
                "Give the same values, or start another run with another --out."
            )

    def record(self, event: RunEvent) -> None:
        """Append one event to metrics.jsonl, with the time of now and the fields that are set.

        Raises:
            RunError: the disk is full or not writable; the file is as it was.
        """
        fields = event.model_dump(mode="json", exclude_unset=True)
        line = {"event": event.event, "time": round(time.time(), 3)}
        _append_line(self.metrics, json.dumps(line | {k: v for k, v in fields.items() if k not in line}))

    def forget_events_after(self, last_round: int) -> None:
        """Drop the events of rounds that a resumed run will do again."""
        kept = [e for e in read_json_lines(self.metrics) if e.get("round", 0) <= last_round]
        with _written(self.metrics):
            write_text(self.metrics, "".join(json.dumps(event) + "\n" for event in kept))

    def log_handler(self) -> logging.Handler:
        """Return a handler that appends to log.jsonl, which the caller adds and removes."""
        handler = _Lines(self.log)
        handler.setFormatter(JsonLines())
        return handler

    def write_summary(self, summary: RunSummary) -> None:
        """Write summary.json.

        Raises:
            RunError: the disk is full or not writable.
        """
        with _written(self.summary):
            write_json(self.summary, summary.to_dict())

    def write_confusion(self, argmax: "Confusion", path: "Confusion") -> None:
        """Write confusion.json.

        Raises:
            RunError: the disk is full or not writable.
        """
        counts = {"argmax": [m.tolist() for m in argmax], "path": [m.tolist() for m in path]}
        with _written(self.confusion):
            write_json(self.confusion, counts, indent=None)


class _Lines(logging.Handler):
    """Append each log record to a file, completely or not at all."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        # The handlers of the standard library swallow such an error; here a full disk ends the run, as with
        # every other file.
        _append_line(self._path, self.format(record))


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into the one RunError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}\n"
            "The last checkpoint is intact: free some space and go on with --resume."
        ) from error


def _append_line(path: Path, line: str) -> None:
    """Append one line completely or not at all.

    Raises:
        RunError: the disk is full or not writable; the file is as it was.
    """
    data = (line + "\n").encode()
    # Unbuffered, so that a line is one write: a reader that follows the file sees complete lines, and a
    # failure is known here.
    with _written(path), path.open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if (count := stream.write(data)) != len(data):  # a disk that is nearly full takes a part
                raise OSError(errno.ENOSPC, f"only {count} of {len(data)} bytes were written")
        except OSError:
            # Half a line would be read as a fault of the file when the run is resumed.
            stream.truncate(before)
            raise


def code_version() -> dict[str, str | None]:
    """Return ``{"version", "commit"}`` of the code that is running.

    Each is None where it cannot be known. A checkout with changes that are not committed gives its
    commit followed by ``-dirty``: nobody else has that code.
    """
    try:
        package: str | None = version("fedbags")
    except PackageNotFoundError:
        package = None
    return {"version": package, "commit": _git_commit(_ROOT)}


def _git_commit(root: Path) -> str | None:
    """Return the commit of the checkout whose top folder is ``root``, or None.

    It is None without a checkout or without git. Code that is installed below some other project's checkout
    has no commit of its own.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None where git fails, is missing or takes too long."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


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


def save_checkpoint(
    folder: Path, state: ServerState, model: _Arrays, best: _Arrays, optimiser: _Arrays
) -> Path:
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
            save_file(whole, partial, metadata={"digest": _digest_of(arrays, text)})
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the checkpoint of round {state.round} could not be written to {folder}: {error}\n"
            "The one before it is intact: free some space and go on with --resume."
        ) from error
    # Files of later rounds, left by a run that was resumed from an earlier checkpoint, do not count as the
    # newest.
    older = [path for path in folder.glob("round-*.safetensors") if path.name <= target.name]
    for old in sorted(older)[:-_KEPT_CHECKPOINTS]:
        old.unlink()
    return target


def newest_checkpoint(
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
            return _load_checkpoint(path)
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


def _load_checkpoint(path: Path) -> tuple[ServerState, dict[str, dict[str, NDArray[Any]]]]:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    stored = arrays.pop(_STATE, None)
    text = metadata.get(_STATE, "").encode() if stored is None else stored.tobytes()
    # safetensors checks the header only; a bit that flipped in an array would otherwise go into the model.
    if metadata.get("digest") != _digest_of(arrays, text):
        raise ValueError("its digest does not match its content")
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for prefix in (_MODEL, _BEST, _OPTIMISER):
        groups[prefix.rstrip("/")] = {
            key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
        }
    return ServerState.model_validate_json(text), groups


def _digest_of(arrays: _Arrays, text: bytes) -> str:
    digest = hashlib.sha256(text)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
