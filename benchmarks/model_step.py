"""Compare one HierarchicalClassifier training step with the plain pipeline on the same backbone.

    python benchmarks/model_step.py [--json] [--pairs 15] [--threads 1]

The plain pipeline has one linear head per level. ResNet-18 at 64 px, bags of 16 images, one bag a step and
four bags a step. A step is forward, hierarchical proportion loss, backward, gradient clipping and AdamW.

Time: the two models alternate in one process, first and second in turn, and the ratio is the median over
pairs, so a slow spell of the machine hits both. It is CPU time, which with one thread is the wall time of an
idle machine. Memory: the peak resident size of a child process that takes three steps, above what it had
after importing torch and running a convolution, as the median of three children each.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from common.config_tables import LossConfig, ModelConfig
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.interfaces import Inputs
from common.model.losses import bag_means, level_divergence, level_weights

BAG = 16
TREES = {"27 leaves": (3, 9, 27), "200 leaves": (13, 38, 200)}
"""Levels of the synthetic hospitals, and of CUB-200-2011 (orders, families, species)."""


def make_step(method: str, bags: int, tree: str) -> Callable[[], None]:
    """Return a training step of a fresh model on fixed random images."""
    top, middle, leaves = TREES[tree]
    rows = [[f"{leaf * top // leaves}", f"{leaf * middle // leaves}", f"{leaf}"] for leaf in range(leaves)]
    # A middle class that would lie below two top classes becomes two classes by its name.
    rows = [[a, f"{a}-{b}", c] for a, b, c in rows]
    hierarchy = Hierarchy.from_rows(["top", "middle", "leaf"], rows)
    model = build_model(ModelConfig(method=method, backbone="resnet18", image_size=64), hierarchy, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(bags * BAG, 3, 64, 64)
    bag_index = torch.arange(bags).repeat_interleave(BAG)
    leaf_counts = torch.randint(0, 3, (bags, leaves)) + 1
    counts = [torch.from_numpy(level) for level in hierarchy.roll_up(leaf_counts.numpy())]
    loss_config = LossConfig()
    weights = level_weights(loss_config, len(counts), progress=0.0)

    def step() -> None:
        optimiser.zero_grad()
        output = model(Inputs(images, bag_index))
        per_bag = level_divergence(output.scores, bag_index, counts, weights)
        if output.penalties:
            error, l1 = output.penalties["reconstruction"], output.penalties["codes"]
            price = loss_config.reconstruction * error + loss_config.sparsity * l1
            per_bag = per_bag + bag_means(price, bag_index, bags)
        per_bag.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()

    return step


def time_ratio(bags: int, tree: str, pairs: int) -> dict[str, float]:
    """Return the median milliseconds of both models, and the median ratio over pairs."""
    steps = [make_step(method, bags, tree) for method in ("lhfglp", "dllp-hierarchical")]
    taken: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 2):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.process_time()
            steps[which]()
            # The first two pairs warm caches and create the optimiser's state.
            if pair >= 2:
                taken[which].append(1000 * (time.process_time() - start))
    ratios = [full / plain for full, plain in zip(*taken, strict=True)]
    return {
        "lhfglp_ms": round(statistics.median(taken[0]), 2),
        "plain_ms": round(statistics.median(taken[1]), 2),
        "time_ratio": round(statistics.median(ratios), 3),
    }


def peak_mib(method: str, bags: int, tree: str) -> float:
    """Return the peak resident size of three steps above the baseline in MiB, in a process of its own."""
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(method, bags, tree)
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024


def memory_ratio(bags: int, tree: str, threads: int) -> dict[str, float]:
    """Return the median peaks over three children each, and their ratio."""

    def child(method: str) -> float:
        command = [sys.executable, __file__, "--threads", str(threads), "--child", method, str(bags), tree]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    full, plain = (
        statistics.median(child(method) for _ in range(3)) for method in ("lhfglp", "dllp-hierarchical")
    )
    return {
        "lhfglp_mib": round(full, 1),
        "plain_mib": round(plain, 1),
        "memory_ratio": round(full / plain, 3),
    }


def main() -> None:
    """Print all cases, with the larger ratios of one and four bags with 27 leaves on top in JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "BAGS", "TREE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        method, bags, tree = options.child
        print(peak_mib(method, int(bags), tree))
        return
    cases = [(tree, bags) for tree in TREES for bags in (1, 4)]
    # Memory is measured first: a child's peak counter starts at its parent's size, here that of torch alone.
    memory = [memory_ratio(bags, tree, options.threads) for tree, bags in cases]
    times = [time_ratio(bags, tree, options.pairs) for tree, bags in cases]
    rows = [
        {"tree": tree, "bags_per_step": bags, **of_time, **of_memory}
        for (tree, bags), of_time, of_memory in zip(cases, times, memory, strict=True)
    ]
    largest = {key: max(row[key] for row in rows[:2]) for key in ("time_ratio", "memory_ratio")}
    if options.json:
        print(json.dumps({**largest, "cases": rows}))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
