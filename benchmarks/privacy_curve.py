"""Measure the accuracy that privacy costs, over epsilon, for noise of each site and for shared noise.

    fedbags bags build ... --bag-size 4 --sites 5 --partition dirichlet:0.5 --out SITES4
    fedbags bags build ... --bag-size 16 --sites 5 --partition dirichlet:0.5 --out SITES16
    python benchmarks/privacy_curve.py OUT "bags of 4=SITES4" "bags of 16=SITES16"

Every point is one ``fedbags simulate`` as a user would run it, in a folder of its own below OUT. A point
whose folder holds a summary is not run again, so the script can be stopped and started. Settings are those
of ``--dp``, with ``--preset shared-noise`` for shared noise of all sites, and of ``--preset dp`` alone
without privacy.

It writes OUT/privacy_curve.json and OUT/privacy_curve.png, with the accuracy per level on pooled test images
(best path), as the mean over the seeds with the lowest and highest, and the largest epsilon that a site
spent: for replacing a bag, for adding or removing one, and by a site's own share of the noise alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from client.ledger.state import LedgerState
from client.site import site_folders
from common.privacy.events import Adjacency

NOISES = ("local", "shared")


@dataclass(frozen=True)
class Point:
    """Name one run: whose noise is None without privacy."""

    sites: Path
    noise: str | None
    epsilon: float | None
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        how = "none" if self.noise is None else f"{self.noise}-{self.epsilon:g}"
        return self.out / f"{self.sites.name}-{how}-seed-{self.seed}"

    def run(self) -> dict[str, Any]:
        """Return the summary of the run, made if its folder holds none yet."""
        summary = self.folder / "summary.json"
        if not summary.exists():
            options = ["--preset", "dp", "--set", f"seed={self.seed}"]
            if self.epsilon is not None:
                options += ["--dp", f"epsilon={self.epsilon:g}"]
            if self.noise == "shared":
                number = len(site_folders(self.sites))
                options += ["--preset", "shared-noise", "--set", f"secure-aggregation.minimum-sites={number}"]
            command = [sys.executable, "-m", "fedbags", "simulate", "--sites-dir", str(self.sites)]
            command += ["--out", str(self.folder), "--workers", "0", "--no-figures", "--json", *options]
            resume = ["--resume"] if (self.folder / "config.toml").exists() else []
            subprocess.run([*command, *resume], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        read: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return read

    def spent(self) -> tuple[float, float, float]:
        """Return the largest epsilons of a site: replace-one, add/remove, and by its own share alone."""
        ledgers = [LedgerState.read(path) for path in self.folder.glob("sites/*/ledger.sqlite")]
        return (
            max(state.spent() for state in ledgers),
            max(state.spent(Adjacency.ADD_REMOVE) for state in ledgers),
            max(state.spent_alone() or state.spent() for state in ledgers),
        )


def majorities(folder: Path) -> list[float]:
    """Return the share of each level's most frequent class among the test images."""
    confusion = json.loads((folder / "confusion.json").read_text(encoding="utf-8"))["argmax"]
    return [max(map(sum, counts)) / sum(map(sum, counts)) for counts in confusion]


def row(points: list[Point]) -> dict[str, Any]:
    """Return one point of the curve from the runs of its seeds."""
    first, levels = points[0], []
    summaries = [point.run() for point in points]
    for number, majority in enumerate(majorities(first.folder)):
        accuracies = [summary["levels"][number]["consistent_accuracy"] for summary in summaries]
        levels.append(
            {
                "name": summaries[0]["levels"][number]["name"],
                "accuracy": statistics.fmean(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "majority": majority,
            }
        )
    worst = [max(found) for found in zip(*(p.spent() for p in points), strict=True)] if first.noise else None
    return {
        "noise": first.noise, "epsilon": first.epsilon, "seeds": len(points), "spent": worst, "levels": levels
    }  # fmt: skip


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy over epsilon, a panel for each federation and kind of noise, a line for each level."""
    figure, axes = plt.subplots(
        len(curves), 2, figsize=(8.8, 3.4 * len(curves)), layout="constrained", sharey=True, squeeze=False
    )
    for panels, (name, rows) in zip(axes, curves.items(), strict=True):
        for panel, noise in zip(panels, NOISES, strict=True):
            shown = [row for row in rows if row["noise"] in (noise, None)]
            for number, level in enumerate(shown[0]["levels"]):
                values = [row["levels"][number] for row in shown]
                means = [value["accuracy"] for value in values]
                spread = [
                    [value["accuracy"] - value["lowest"] for value in values],
                    [value["highest"] - value["accuracy"] for value in values],
                ]
                drawn = panel.errorbar(
                    range(len(shown)), means, yerr=spread, marker="o", capsize=3, label=level["name"]
                )
                panel.axhline(level["majority"], color=drawn.lines[0].get_color(), linestyle=":", linewidth=1)
            panel.set_xticks(
                range(len(shown)), [f"{row['epsilon']:g}" if row["epsilon"] else "none" for row in shown]
            )
            panel.set_title(f"{name}, {noise} noise")
            panel.set_ylim(0, 1)
    axes[0, 0].legend(loc="lower right")
    figure.supxlabel("epsilon per site (replace-one bag); none: not private")
    figure.supylabel("accuracy on test images (dotted: majority class)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("federations", nargs="+", metavar="NAME=SITES")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    curves: dict[str, list[list[Point]]] = {}
    for text in options.federations:
        name, _, sites = text.rpartition("=")
        kinds = [(noise, epsilon) for noise in NOISES for epsilon in sorted(options.epsilons)]
        curves[name or sites] = [
            [Point(Path(sites), noise, epsilon, seed, options.out) for seed in options.seeds]
            for noise, epsilon in [*kinds, (None, None)]
        ]
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        everything = [point for rows in curves.values() for points in rows for point in points]
        list(pool.map(Point.run, sorted(everything, key=lambda point: point.seed)))
    rows = {name: [row(points) for points in found] for name, found in curves.items()}
    (options.out / "privacy_curve.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    draw(rows, options.out / "privacy_curve.png")
    if options.json:
        print(json.dumps(rows))
        return
    for name, found in rows.items():
        for line in found:
            levels = ", ".join(f"{v['name']} {v['accuracy']:.3f}" for v in line["levels"])
            how = (
                "not private"
                if line["noise"] is None
                else f"{line['noise']} noise, epsilon {line['epsilon']:g}"
            )
            print(f"{name}, {how}: {levels} (spent {line['spent']})")


if __name__ == "__main__":
    main()
