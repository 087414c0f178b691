"""Find out which cells of a comparison must run, and run several at once, each in its own process.

A cell is done when its run folder holds a result and an order with the same identity. The identity holds by
name everything that the figures depend on, so that the message can name what changed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict, ValidationError

from common.config import Scalar
from common.files import write_text
from deploy.compare.scenario import WEIGHTS, Cell

_ORDER, RESULT, LOG = "order.json", "result.json", "cell.log"
"""Files in the run folder of a cell."""
_PLACES = ("run-dir", "sites-dir", "resume", "name", "train.device")
"""Keys that say where and how a run is done, not what it computes; of the weights file the name counts, once
there is a result."""
_DIVISION = ("bags", "groups", "bag_size", "seed", "partition", "sites")
"""What of a division differs between the cells of one source; the rest of it is in the digest of the data."""
_DIFFERENCES_TOLD = 3
_INTERVAL = 0.5
_GRACE = 10.0
"""Seconds that a cell gets to end when the comparison is stopped."""
# A cell computes on one thread, so that `jobs` cells share the cores and their times can be compared.
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Identity = dict[str, Scalar | None]


class Order(BaseModel):
    """Describe the work of one cell.

    Attributes:
        row: the cell in the table: method, bag_size, images_per_bag, seed, setting, passes (and site).
        identity: everything that its figures depend on, by name.
        config: the complete flat configuration of the run.
        test: the folder of the test images.
        probes: the parts that measure the trained model besides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: dict[str, Scalar]
    identity: dict[str, Scalar | None]
    config: dict[str, Scalar]
    test: str
    probes: tuple[str, ...] = ()

    def save(self, run: Path) -> None:
        """Write the order to the run folder, which is made if it is missing."""
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / _ORDER, self.model_dump_json(indent=2, exclude_defaults=True) + "\n")

    @classmethod
    def load(cls, run: Path) -> "Order":
        """Read the order from the run folder."""
        return cls.model_validate_json((run / _ORDER).read_bytes())


class State(StrEnum):
    """Name what a cell's folder holds."""

    DONE = "done"
    STOPPED = "stopped"
    """An order with the same identity, without a result: it goes on from its checkpoint. Or trained, and
    without figures of a probe that is asked for: it is probed."""
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
    run, now = runs / cell.name, _identity(cell, digest)
    if not run.exists():
        return Planned(cell, run, now, digest, State.NEW)
    try:
        before = Order.load(run)
    except (OSError, ValidationError):
        return Planned(cell, run, now, digest, State.CHANGED, (f"it holds no readable {_ORDER}",))
    if different := _differences(before.identity, now):
        return Planned(cell, run, now, digest, State.CHANGED, different)
    if (run / RESULT).exists():
        # Nothing that is asked of a trained model is a reason to train it again.
        state = State.DONE if not cell.probes or _is_probed(run, cell.probes) else State.STOPPED
        return Planned(cell, run, now, digest, state)
    # A checkpoint lacks the weights that are not trained: a run can be resumed with its first weights only.
    places = {WEIGHTS: before.config.get(WEIGHTS)}, {WEIGHTS: cell.config.to_flat()[WEIGHTS]}
    moved = _differences(*places)
    return Planned(cell, run, now, digest, State.CHANGED if moved else State.STOPPED, moved)


def of_probes(figures: Mapping[str, float], probes: Iterable[str]) -> dict[str, float]:
    """Return those of the figures by column, such as ``recall.leaf@1``, that are of these probes."""
    return {column: value for column, value in figures.items() if column.partition(".")[0] in set(probes)}


def _is_probed(run: Path, probes: Sequence[str]) -> bool:
    """Return True if the result in this folder has figures of each of the probes."""
    figures = json.loads((run / RESULT).read_text(encoding="utf-8")).get("probes", {})
    return all(of_probes(figures, [probe]) for probe in probes)


def _identity(cell: Cell, digest: str) -> Identity:
    """Return everything that the cell's figures depend on, except the code."""
    config = {key: value for key, value in cell.config.to_flat().items() if key not in _PLACES}
    # A weights file may be moved to another folder, so its name counts and its path does not.
    config[WEIGHTS] = Path(str(config[WEIGHTS])).name
    division = {f"data.{key}": getattr(cell.division, key) for key in _DIVISION}
    return {**config, **division, "data.digest": digest, "setting": cell.setting.value, "site": cell.site}


def _differences(before: Mapping[str, Scalar | None], now: Mapping[str, Scalar | None]) -> tuple[str, ...]:
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
    more = len(found) - _DIFFERENCES_TOLD
    return "; ".join(found[:_DIFFERENCES_TOLD]) + (f"; and {more} more" if more > 0 else "")


def run_all(
    folders: Sequence[Path],
    jobs: int,
    look: Callable[[Sequence[Path]], None],
    ended: Callable[[Path, int], None],
) -> None:
    """Run the cell of every folder, in this order, ``jobs`` at a time.

    Args:
        folders: run folders with an order; the log of a cell is appended to LOG there.
        jobs: processes at once.
        look: called twice a second with the folders at work.
        ended: called with a folder and its process's exit status (negative: the signal that ended it).

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the cells have ended by then.
    """
    waiting, running = deque(folders), dict[Path, subprocess.Popen[bytes]]()
    with _sigterm_is_ctrl_c():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.popleft()
                    running[folder] = _start(folder)
                # Before the pause: a cell that starts and ends within it would otherwise never be shown.
                look(list(running))
                time.sleep(_INTERVAL)
                for folder, process in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[folder]
                        _close(process)
                        ended(folder, status)
        finally:
            _end(list(running.values()))


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.compare.cell", str(folder)],
            # The pipe closes when this process is gone, which ends the cell: see cell.end_with_parent.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _THREADS,
            # In a session of its own a cell gets no Ctrl-C from the terminal, and this process ends it.
            start_new_session=True,
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all processes, by SIGTERM first and after the grace period by SIGKILL.

    A cell can be ended at any time, because a checkpoint is written completely or not at all.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close(process)


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
