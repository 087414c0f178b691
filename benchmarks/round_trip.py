"""Compare a trivial round with 50 sites in the local grid with one in Flower's own simulation.

    python benchmarks/round_trip.py [--json] [--sites 50] [--rounds 10] [--no-flower]

The ClientApp returns the small model that it was sent, and the ServerApp times each round. Flower's start-up
(SuperLink, Ray) is reported separately.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks_apps import ROUNDS_FILE, server_app

from common.config import RunConfig
from deploy.simulation.flower_engine import run_flower
from deploy.simulation.local_grid import LocalGrid

APPS = {"serverapp": "benchmarks_apps:server_app", "clientapp": "benchmarks_apps:client_app"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-flower", action="store_true")
    options = parser.parse_args()
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig().with_changes(
            {"federation.sites": options.sites, "rounds": options.rounds, "run-dir": folder}
        )
        flat = config.to_flat()
        with LocalGrid(options.sites, flat, client_app=APPS["clientapp"]) as grid:
            server_app(grid, grid.server_context(flat))
        rounds_file = Path(folder) / ROUNDS_FILE
        result["local_seconds"] = statistics.median(json.loads(rounds_file.read_text()))
        if not options.no_flower:
            rounds_file.unlink()
            # Flower's processes load the apps of this folder too.
            os.environ["PYTHONPATH"] = str(Path(__file__).parent)
            started = time.perf_counter()
            run_flower(config, APPS)
            seconds = json.loads(rounds_file.read_text())
            result["flower_seconds"] = statistics.median(seconds)
            result["flower_start_seconds"] = time.perf_counter() - started - sum(seconds)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22s} {value:8.3f}")


if __name__ == "__main__":
    main()
