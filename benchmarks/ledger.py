"""Measure reserving and confirming a round in a ledger of 200 rounds, and in two long ledgers.

    python benchmarks/ledger.py --json
    python benchmarks/ledger.py --long --json

Each round is a reservation checked against the cap and its confirmation, both synced to the disk. The
time is that of rounds 181 to 200 under a cap that round 200 just meets, where the check has to be exact.
A row costs five syncs, so a disk (or a busy machine) whose fsync takes 4 ms cannot be fast here.

With ``--long`` it measures a ledger of 400 different noise multipliers, and one of 100,000 rows. The times
are those of a new process, for opening the ledger, one reservation with new noise, and its statement, without
imports. For the 400 it is also given without the file of what was composed before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from client.ledger.anchor import CarryFile
from client.ledger.file import Kind
from client.ledger.ledger import Ledger, Opening
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, PoissonGaussian

ROUNDS, LAST = 200, 20
DELTA = 1e-5
SIGMAS, ROWS, BATCH = 400, 100_000, 10_000
NEW_PROCESS = f"""
import json, sys, time
from pathlib import Path
import dp_accounting.pld.privacy_loss_distribution
from client.ledger.ledger import Ledger, Opening
from common.privacy.events import PoissonGaussian
times = [time.perf_counter()]
ledger = Ledger.open(Path(sys.argv[1]), Opening("site-1", "version", 1e3, {DELTA}))
times.append(time.perf_counter())
ledger.reserve(PoissonGaussian(sample_rate=0.1, noise_multiplier=float(sys.argv[2]), steps=1), "run", 1)
times.append(time.perf_counter())
ledger.statement(1)
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def timed(action: Callable[[], object]) -> float:
    """Return the milliseconds that an action takes."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def sync_once(path: Path) -> None:
    """Append to a file and wait for the disk, which is the least that a row costs."""
    with path.open("ab") as stream:
        stream.write(bytes(4096))
        stream.flush()
        os.fsync(stream.fileno())


def measure() -> dict[str, float]:
    """Return the milliseconds of a round, of a statement's figure, and of a bare fsync of this disk."""
    event = PoissonGaussian(sample_rate=0.1, noise_multiplier=4.0, steps=5)
    cap = spent([event] * ROUNDS, DELTA, Adjacency.REPLACE_ONE)
    rounds, statements, syncs = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ledger = Ledger.open(folder / "ledger.sqlite", Opening("site-1", "version", cap, DELTA))

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


def in_new_process(path: Path, sigma: float) -> dict[str, float]:
    """Return the seconds that a new process takes for opening, reserving and stating."""
    command = [sys.executable, "-c", NEW_PROCESS, str(path), str(sigma)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    times = (round(seconds, 3) for seconds in json.loads(result.stdout))
    return dict(zip(("open_s", "reserve_s", "statement_s"), times, strict=True))


def measure_long() -> dict[str, dict[str, float]]:
    """Return the seconds of a new process with each of the two long ledgers."""
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Ledger.open(Path(scratch) / "sigmas.sqlite", Opening("site-1", "version", 1e3, DELTA))
        for number in range(SIGMAS):
            event = PoissonGaussian(sample_rate=0.1, noise_multiplier=20 + number / 100, steps=1)
            ledger.reserve(event, "run", number)
        ledger.statement(SIGMAS)
        figures[f"{SIGMAS} sigmas"] = in_new_process(ledger.path, 10.0)
        CarryFile(ledger.path).path.unlink()
        figures[f"{SIGMAS} sigmas, without the file"] = in_new_process(ledger.path, 11.0)

        ledger = Ledger.open(Path(scratch) / "rows.sqlite", Opening("site-1", "version", 1e3, DELTA))
        event = PoissonGaussian(sample_rate=0.1, noise_multiplier=500.0, steps=1)
        body = {"event": event.model_dump(), "run_id": "run", "round": 1}
        for _ in range(ROWS // BATCH):
            # Many rows in one transaction, because a sync for each of 100,000 rows would take too long.
            with ledger.transaction() as db:
                for _ in range(BATCH):
                    ledger.append(db, Kind.RESERVED, body)
        figures[f"{ROWS} rows"] = in_new_process(ledger.path, 10.0)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--long", action="store_true", help="the two long ledgers, which take minutes")
    arguments = parser.parse_args()
    if arguments.long:
        for name, times in (long := measure_long()).items():
            if not arguments.json:
                print(f"{name}: " + ", ".join(f"{key} {seconds}" for key, seconds in times.items()))
        if arguments.json:
            print(json.dumps(long, indent=2))
        return
    as_json, figures = arguments.json, measure()
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
