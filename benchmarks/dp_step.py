"""Compare one private training step with the non-private step on the same four bags.

    python benchmarks/dp_step.py [--json] [--repeats 7]

ResNet-18 at 64 px with one linear head per level (the plain pipeline, because stock Opacus has no per-sample
rule for the dictionary), 4 bags of 8, 16 and 32 images, AdamW, one thread. Three ways of one optimiser step:

    non-private  forward and backward of all bags at once, gradient clipping, AdamW
    private      forward and backward bag by bag, clipping each, noise, AdamW (client.private_training)
    stock        Opacus's per-sample hooks over the images of the bags (GradSampleModule, DPOptimizer); the
                 usual way, shown for its cost: it clips per image, which bounds nothing here

``ratio`` and ``stock_ratio`` are medians over repetitions of time against the non-private step, where the
ways take turns. Time is the processor's, of the one thread, which equals the clock's where nothing else runs,
and is fair where something does. The private step takes one backward pass per bag, and draws its noise from
the plan's AES-256 generator, as a real run does, for all 11 M parameters. The stock way draws it with
torch.normal.

``peak_ratio`` compares the most memory that a step adds to the model: gradients, sums, optimiser state,
activations and scratch. Each way runs in a child process whose allocator gives freed memory back at once. The
kernel's high-water mark is reset after a warm-up, so the mark follows live memory. It is a median of three.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from client.private_training import BagDPOptimizer
from common.config_tables import LossConfig, ModelConfig
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.interfaces import Features, Inputs, Output
from common.model.losses import level_divergence, level_weights
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.randomness import SecureRandomness

BAGS = 4
SIZES = (8, 16, 32)
CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0
WAYS = ("non-private", "private", "stock")
# Blocks from 64 KiB on are mapped on their own and unmapped when they are freed, so that the resident size
# follows live memory.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# Opacus hooks modules whose input needs no gradient, on purpose; torch says so once per module.
warnings.filterwarnings("ignore", message="Full backward hook is firing")
warnings.filterwarnings("ignore", message="Secure RNG turned off")

Step = Callable[[], None]


@dataclass(frozen=True)
class Bags:
    """Hold four bags of random images with random counts."""

    images: Tensor
    index: Tensor
    counts: list[Tensor]
    weights: tuple[float, ...]
    hierarchy: Hierarchy

    @classmethod
    def draw(cls, size: int) -> "Bags":
        """Draw bags of ``size`` images of 64 px, with the 3, 9 and 27 classes of the synthetic hospitals."""
        rows = [[f"{leaf // 9}", f"{leaf // 3}-", f"{leaf}+"] for leaf in range(27)]
        hierarchy = Hierarchy.from_rows(["top", "middle", "leaf"], rows)
        levels = hierarchy.roll_up((torch.randint(0, 3, (BAGS, 27)) + 1).numpy())
        return cls(
            images=torch.randn(BAGS * size, 3, 64, 64),
            index=torch.arange(BAGS).repeat_interleave(size),
            counts=[torch.from_numpy(level) for level in levels],
            weights=level_weights(LossConfig(), 3, progress=0.0),
            hierarchy=hierarchy,
        )

    def loss(self, model: nn.Module, bag: int | None = None) -> Tensor:
        """Return the mean loss of all bags, or the loss of one."""
        if bag is None:
            return self.divergence(model, self.images, self.index, self.counts)
        chosen = self.index == bag
        counts = [level[bag : bag + 1] for level in self.counts]
        return self.divergence(
            model, self.images[chosen], torch.zeros(int(chosen.sum()), dtype=torch.int64), counts
        )

    def divergence(self, model: nn.Module, images: Tensor, index: Tensor, counts: list[Tensor]) -> Tensor:
        """Return the proportion loss of these images."""
        return level_divergence(model(Inputs(images, index)).scores, index, counts, self.weights).mean()


def make_model(bags: Bags) -> nn.Module:
    """Return a ResNet-18 with GroupNorm and a linear head per level."""
    config = ModelConfig(method="dllp-hierarchical", backbone="resnet18", image_size=64)
    return build_model(config, bags.hierarchy, seed=0).train()


def make_step(way: str, model: nn.Module, bags: Bags) -> Step:
    """Return one optimiser step of a way, on a model of its own."""
    if way == "non-private":
        return non_private_step(model, bags)
    if way == "stock":
        return stock_step(model, bags)
    return private_step(model, bags)


def non_private_step(model: nn.Module, bags: Bags) -> Step:
    """Return the step of client.training."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = bags.loss(model)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()

    return step


def private_step(model: nn.Module, bags: Bags) -> Step:
    """Return the step of client.private_training, with all four bags drawn."""
    settings = PlanSettings(
        delta=1e-3,
        clip_norm=CLIP_NORM,
        number_of_bags=BAGS,
        sample_rate=1.0,
        steps_per_round=1,
        rounds=1,
        release=None,
    )
    plan = PrivacyPlan.build(settings, SecureRandomness(), noise_multiplier=NOISE_MULTIPLIER)
    optimiser = BagDPOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), plan, round=1)

    def step() -> None:
        for bag in range(BAGS):
            optimiser.add_bag(bags.loss(model, bag))
        optimiser.step()

    return step


class _Plain(nn.Module):
    """Compute the same scores from tensors, which is all that Opacus's hooks take as a layer's input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = model.backbone.body
        self.heads = nn.ModuleList(nn.Linear(head.in_features, head.out_features) for head in model.heads)
        for own, head in zip(self.heads, model.heads, strict=True):
            own.load_state_dict(head.state_dict())

    def forward(self, inputs: Inputs) -> Output:
        pooled = self.body(inputs.images)
        return Output(tuple(head(pooled) for head in self.heads), Features(pooled), {}, {})


def stock_step(model: nn.Module, bags: Bags) -> Step:
    """Return the step of Opacus as its tutorials use it, on the images of the bags."""
    for module in model.modules():
        if isinstance(module, BasicBlock):
            # Opacus's hooks refuse torchvision's in-place residual sum.
            module.forward = partial(residual_block, module)
    hooked = GradSampleModule(_Plain(model))
    optimiser = DPOptimizer(
        torch.optim.AdamW(hooked.parameters(), lr=1e-4),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(bags.images),
    )

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        bags.loss(hooked).backward()
        optimiser.step()

    return step


def residual_block(block: BasicBlock, x: Tensor) -> Tensor:
    """Compute torchvision's BasicBlock with the sum out of place, to the same numbers."""
    y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def times(size: int, repeats: int) -> dict[str, float]:
    """Return the median processor milliseconds of a step of each way, where the ways take turns."""
    bags = Bags.draw(size)
    steps = {way: make_step(way, make_model(bags), bags) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(-1, repeats):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            if way == "stock" and repeat > 2:
                # A stock step takes ten times as long as the others, and is far from any limit.
                continue
            start = time.process_time()
            steps[way]()
            # The first one warms caches and creates the optimiser's state.
            if repeat >= 0:
                taken[way].append(1000 * (time.process_time() - start))
    return {way: statistics.median(values) for way, values in taken.items()}


def added_memory(way: str, size: int) -> float:
    """Return the MiB that two steps add to the model at their highest, in a process of its own."""
    bags = Bags.draw(size)
    model = make_model(bags)
    make_step(way, model, bags)()
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.__dict__.clear()
    gc.collect()
    step = make_step(way, model, bags)
    before = status("VmRSS")
    # Resets the high-water mark (proc(5)), which the warm-up has raised.
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """Return a field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def child(way: str, size: int) -> float:
    """Return the result of added_memory in a fresh process."""
    command = [sys.executable, __file__, "--child", way, str(size)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **CHILD_ENVIRONMENT}
    )
    return float(done.stdout)


def measure(size: int, repeats: int) -> tuple[dict[str, float], str]:
    """Return the ratios for one size of bags, and the figures behind them in words."""
    peaks = {way: statistics.median(child(way, size) for _ in range(3)) for way in ("non-private", "private")}
    taken = times(size, repeats)
    base = taken["non-private"]
    row = {
        "ratio": round(taken["private"] / base, 3),
        "stock_ratio": round(taken["stock"] / base, 2),
        "peak_ratio": round(peaks["private"] / peaks["non-private"], 3),
    }
    words = ", ".join(f"{way} {taken[way]:.0f}" for way in WAYS)
    return row, (
        f"bag {size}: ms per step: {words}; MiB added: non-private {peaks['non-private']:.0f}, "
        f"private {peaks['private']:.0f}"
    )


def main() -> None:
    """Print the ratios of every size, as a table or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.child:
        way, size = options.child
        print(added_memory(way, int(size)))
        return
    rows = {}
    for size in SIZES:
        rows[f"bag_{size}"], words = measure(size, options.repeats)
        print(words, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(name, "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
