"""Kills a process at every traced instruction between reserving and confirming; see test_ledger.py.

    python crash_sweep.py LEDGER KIND STRIDE [--count-confirmed-only]

A process of its own: it forks, which the test runner, with its threads, should not. For each point the
ledger and its anchor are copied, a child does one round on the copies and kills itself at that point, and the
parent reads them afresh. Prints one JSON object; KIND is ``round`` or ``release``.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from client.ledger import state
from client.ledger.anchor import LedgerLostError, anchor_file
from client.ledger.check import verify
from client.ledger.file import Entry, Kind
from client.ledger.ledger import Ledger, Opening
from client.ledger.state import LedgerState, _untally
from common.privacy.accounting import spent as epsilon
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, event_from_dict
from common.privacy.proportions import release_counts
from common.privacy.randomness import SecureRandomness

LEDGER = str(Path(state.__file__).parent)
EVENT = PoissonGaussian(sample_rate=0.1, noise_multiplier=4.0, steps=20)
RELEASE = release_counts(np.array([[3, 5], [4, 4]]), scale=4.0, randomness=SecureRandomness())


def work(path: Path, kind: str, started: Path) -> None:
    """What must be charged before ``started`` appears, which stands for training or sending."""
    ledger = Ledger.open(path, Opening("site-1", "v1", 8.0, 1e-5))
    if kind == "release":
        ledger.store_release(RELEASE, "run")
        started.touch()
    else:
        reservation = ledger.reserve(EVENT, "run", 2)
        started.touch()
        ledger.confirm(reservation)


def renew(template: Path, copy: Path) -> None:
    """Fresh copies of the ledger and its anchor, without what a killed process left."""
    for leftover in [*template.parent.glob("copy.*"), *template.parent.glob(".copy.*")]:
        leftover.unlink()
    shutil.copy(template, copy)
    shutil.copy(anchor_file(template).path, anchor_file(copy).path)


def kill_at(point: int, counter: list[int]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that counts the instructions of the ledger's modules and dies at ``point``."""

    def trace(frame: FrameType, happened: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith((LEDGER, __file__)):
            return None
        frame.f_trace_opcodes = True
        if happened in ("opcode", "line"):
            counter[0] += 1
            if counter[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def count_confirmed_only() -> None:
    """The planted bug: an unconfirmed reservation is taken for one that never happened."""

    def forgetful(self: LedgerState, entry: Entry) -> None:
        if entry.kind == Kind.RESERVED:
            self.open_reservations.add(entry.seq)
        elif entry.kind == Kind.CONFIRMED:
            row = int(entry.body["reservation"])
            self.open_reservations.remove(row)
            self.events.append(event_from_dict(self.entries[row - 1].body["event"]))
        else:
            right(self, entry)

    right = LedgerState._take
    LedgerState._take = forgetful  # type: ignore[method-assign]


def main() -> None:
    """Sweep, and print what was found."""
    template, kind, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if "--count-confirmed-only" in sys.argv:
        count_confirmed_only()
    copy, started = template.with_name("copy.sqlite"), template.with_name("started")
    before = LedgerState.read(template).spent()
    charge: list[PoissonGaussian | DiscreteLaplace] = [EVENT]
    if kind == "release":
        charge = [RELEASE.event]

    renew(template, copy)
    counter = [0]
    sys.settrace(kill_at(0, counter))
    work(copy, kind, started)
    sys.settrace(None)
    after = LedgerState.read(copy).spent()  # also fills the caches that the children inherit

    points = range(1, counter[0] + 1, stride)
    understated, forgotten, refused, problems, killed, charged = [], [], [], [], 0, 0
    for point in points:
        started.unlink(missing_ok=True)
        renew(template, copy)
        child = os.fork()
        if child == 0:
            sys.settrace(kill_at(point, [0]))
            work(copy, kind, started)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        # The anchor is never ahead of the chain, and what it alone would charge is never too little.
        problems += [str(problem) for problem in verify(copy, anchor=anchor_file(copy))]
        spent = LedgerState.read(copy).spent(Adjacency.REPLACE_ONE)
        charged += spent > before
        due = after if started.exists() else before
        if spent < due:
            understated.append(point)
        anchor = anchor_file(copy).read()
        if anchor is None or epsilon(_untally(anchor.events), 1e-5, Adjacency.REPLACE_ONE) < due:
            forgotten.append(point)
        try:
            Ledger.open(copy, Opening("site-1", "v1", 8.0, 1e-5))
        except LedgerLostError:
            refused.append(point)
    print(
        json.dumps(
            {
                "instructions": counter[0],
                "points": len(points),
                "killed": killed,
                "charged": charged,
                "understated": understated,
                "forgotten": forgotten,
                "refused": refused,
                "problems": problems,
                "charge": [event.model_dump() for event in charge],
            }
        )
    )


if __name__ == "__main__":
    main()
