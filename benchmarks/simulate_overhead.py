"""Compare `simulate` with five sites with a bare PyTorch loop that takes the same steps on one thread.

    python benchmarks/simulate_overhead.py [--json] [--rounds 3] [--repeats 3]

Both train the same model on the same synthetic bags (cached), with the same augmentation, loss, optimiser,
evaluation on held-back bags and final test. The bare loop has no messages, records, guard, checkpoints or
logs. They alternate in one process and thread. The ratio is of the medians of processor time, which equals
the clock's where nothing else runs, and is fair where something does.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.evaluation import evaluate_bags, evaluate_labelled
from client.site import site_folders
from client.training import train_round
from common.config import RunConfig
from common.model.build import build_model
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.simulation.local_grid import LocalGrid
from server.app import app


def bare_loop(config: RunConfig, sites: list[Path]) -> None:
    size = config.model.image_size
    stores = [BagStore.open(site, size) for site in sites]
    model = build_model(config.model, stores[0].hierarchy, config.seed)
    for number in range(1, config.rounds + 1):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for store in stores:
            model.load_state_dict(start)
            train_round(model, store, config, number)
            for name, value in model.state_dict().items():
                total[name] += value / len(stores) if value.is_floating_point() else 0
        model.load_state_dict({n: v if v.is_floating_point() else start[n] for n, v in total.items()})
        for store in stores:
            evaluate_bags(model, store, config)
    for site in sites:
        test = LabelledImages.open(site, size)
        assert test is not None
        evaluate_labelled(model, test, config)


def simulated(config: RunConfig, folder: Path) -> None:
    flat = config.with_changes({"run-dir": str(folder)}).to_flat()
    with LocalGrid(config.federation.sites, flat) as grid:
        app(grid, grid.server_context(flat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sites_dir = Path(folder) / "sites"
        write_synthetic_sites(sites_dir, SyntheticHospitals(sites=5, seed=0, image_size=32))
        config = RunConfig().with_changes(
            {"rounds": options.rounds, "sites-dir": str(sites_dir), "model.image-size": 32}
        )
        sites = site_folders(sites_dir)
        # Builds the image caches, which both sides then only read.
        bare_loop(config.with_changes({"rounds": 1}), sites)
        times: dict[str, list[float]] = {"bare": [], "simulate": []}
        for repeat in range(options.repeats):
            for name in times:
                started = time.process_time()
                if name == "bare":
                    bare_loop(config, sites)
                else:
                    simulated(config, Path(folder) / f"run-{repeat}")
                times[name].append(time.process_time() - started)
    bare, ours = (statistics.median(times[name]) for name in ("bare", "simulate"))
    result = {"ratio": ours / bare, "bare_seconds": bare, "simulate_seconds": ours}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"simulate / bare loop: {result['ratio']:.3f}  ({ours:.2f} s / {bare:.2f} s)")


if __name__ == "__main__":
    main()
