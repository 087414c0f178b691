"""Measure the privacy report of 50 sites of different sizes with 200 rounds each.

    python benchmarks/report.py --json

No two sites share an epsilon, which is the worst case, because every figure has to be computed. The time is
that of `deploy.report.files.report` in a fresh process, from the first import of the accountants to the last
file. On a busy machine use the processor seconds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from client.ledger.file import (
    Kind,
    append,
    create,
    read_entries,
    writing,
)
from client.ledger.state import LedgerState
from common.privacy.events import PoissonGaussian

SITES, ROUNDS, STEPS, DELTA = 50, 200, 4, 1e-4
EXPECTED_BAGS = 32
TIMED = """
import json, os, sys, time
from pathlib import Path
from deploy.report.files import report

if __name__ == "__main__":  # the report's worker processes read this file too
    started = time.perf_counter()
    written = report([Path(sys.argv[1])], Path(sys.argv[2]))
    seconds = time.perf_counter() - started
    cpu = sum(os.times()[:4])
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "problems": written["problems"]}))
"""


def write_run(run: Path) -> None:
    """Write a run folder as the server leaves it, with the simulated sites' ledgers."""
    (run / "sites").mkdir(parents=True)
    statements, releases, events = {}, {}, []
    for number in range(SITES):
        site, bags = f"site-{number + 1:02d}", 60 + 37 * number
        rate = EXPECTED_BAGS / bags
        event = PoissonGaussian(sample_rate=rate, noise_multiplier=0.9 + 14 * rate, steps=STEPS)
        book = write_ledger(run / "sites" / site, site, event)
        epsilon = book.spent()
        statements[site] = {
            "site": site,
            "round": ROUNDS,
            "unit": "bag",
            "adjacency": "replace-one",
            "epsilon": epsilon,
            "delta": DELTA,
            "events": [merged.model_dump() for merged in book.merged],
            "budget_left": book.cap.epsilon - epsilon,
            "ledger_head": book.head,
        }
        releases[site] = {"mechanism": "none", "granularity": "none", "bags": bags, "event": {}}
        events += [
            {"event": "statement", "round": r, "site": site, "epsilon": epsilon * (r / ROUNDS) ** 0.5}
            for r in range(1, ROUNDS + 1)
        ]
    summary = {"rounds": ROUNDS, "statements": statements, "releases": releases, "left_out": []}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "config.toml").write_text(
        f'name = "benchmark"\n[dp]\nepsilon = 50.0\ndelta = {DELTA}\nsteps-per-round = {STEPS}\n'
        f"[federation]\nsites = {SITES}\n"
    )


def write_ledger(folder: Path, site: str, event: PoissonGaussian) -> LedgerState:
    """Write a site's ledger with all rows in one transaction."""
    folder.mkdir()
    path, common = folder / "ledger.sqlite", {"data_version": "v1", "time": "2026-01-01T00:00:00+00:00"}
    create(path, {**common, "site": site, "unit": "bag", "cap_epsilon": 50.0, "cap_delta": DELTA})
    # One sync per row would take minutes.
    with writing(path) as db:
        last = read_entries(db, path)[-1]
        for number in range(1, ROUNDS + 1):
            body = {**common, "event": event.model_dump(), "run_id": "benchmark", "round": number}
            last = append(db, last, Kind.RESERVED, body)
            last = append(db, last, Kind.CONFIRMED, {**common, "reservation": last.seq})
    return LedgerState.read(path)


def timed(run: Path, out: Path) -> dict[str, float]:
    """Return the wall and processor seconds of the report of a run in a fresh process."""
    script = run.parent / "timed.py"
    script.write_text(TIMED)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(run), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    if figures["problems"]:
        raise SystemExit(f"the report found problems: {figures['problems'][:3]}")
    return {key: round(figures[key], 2) for key in ("seconds", "cpu_seconds")}


def measure() -> dict[str, object]:
    """Return the times of the report with the sites' ledgers, and from their statements alone."""
    with tempfile.TemporaryDirectory() as scratch:
        run, out = Path(scratch) / "run", Path(scratch) / "out"
        write_run(run)
        with_ledgers = timed(run, out)
        shutil.rmtree(run / "sites")
        return {
            **with_ledgers,
            "from_statements": timed(run, out),
            "page_kb": (out / "report.html").stat().st_size // 1000,
            "sites": SITES,
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
        print(f"report of {SITES} sites x {ROUNDS} rounds: {figures}")


if __name__ == "__main__":
    main()
