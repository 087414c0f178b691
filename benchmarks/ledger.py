"""Reserving and confirming a round in a ledger that already holds 200 rounds.

    python benchmarks/ledger.py --json

Each round is a reservation checked against the cap and its confirmation, both synced to the disk. The
time is that of rounds 181 to 200 under a cap that round 200 just meets, where the check has to be exact.
A row costs five syncs, so a disk (or a busy machine) whose fsync takes 4 ms cannot be fast here.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from client.ledger import Ledger
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, PoissonGaussian

ROUNDS, LAST = 200, 20
DELTA = 1e-5


def timed(action: Callable[[], object]) -> float:
    """Milliseconds that an action takes."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def sync_once(path: Path) -> None:
    """Append to a file and wait for the disk: what a row costs at least."""
    with path.open("ab") as stream:
        stream.write(bytes(4096))
        stream.flush()
        os.fsync(stream.fileno())


def measure() -> dict[str, float]:
    """Milliseconds per round, for the figure of a statement, and for a bare fsync of this disk."""
    event = PoissonGaussian(sample_rate=0.1, noise_multiplier=4.0, steps=5)
    cap = spent([event] * ROUNDS, DELTA, Adjacency.REPLACE_ONE)
    rounds, statements, syncs = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ledger = Ledger.open(folder / "ledger.sqlite", "site-1", "version", cap, DELTA)

        def one_round(number: int) -> None:
            ledger.confirm(ledger.reserve(event, "run", number))

        for number in range(1, ROUNDS + 1):
            rounds.append(timed(partial(one_round, number)))
            if number > ROUNDS - LAST:
                statements.append(timed(partial(ledger.statement, number)))
                syncs.append(timed(partial(sync_once, folder / "fsync")))
    return {
        "reserve_confirm_ms": round(statistics.median(rounds[-LAST:]), 2),
        "worst_ms": round(max(rounds[-LAST:]), 2),
        "statement_ms": round(statistics.median(statements), 2),
        "fsync_ms": round(statistics.median(syncs), 2),
        "rounds": ROUNDS,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    figures = measure()
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        print(
            f"reserve + confirm at {ROUNDS} rounds: {figures['reserve_confirm_ms']} ms "
            f"(worst {figures['worst_ms']}), statement {figures['statement_ms']} ms; "
            f"one fsync of this disk {figures['fsync_ms']} ms"
        )


if __name__ == "__main__":
    main()
