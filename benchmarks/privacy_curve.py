"""Measure the accuracy that privacy costs, for one federation at several epsilons and without.

    fedbags bags build ... --bag-size 4 --sites 5 --partition dirichlet:0.5 --out SITES4
    python benchmarks/privacy_curve.py SITES4 OUT [--seeds 0 1] [--epsilons 16 8 4 2] [--json]

Every point is one ``fedbags simulate`` as a user would run it, in a folder of its own below OUT. A point
whose folder holds a summary is not run again, so the script can be stopped and started. Settings are those
that ``--dp`` brings. Without privacy the same model is trained on the same fixed features by AdamW. Of
several learning rates the run with the best score on held-back bags is taken, never by test images.

It writes OUT/privacy_curve.json and OUT/privacy_curve.png, with the accuracy per level on pooled test images
(best path), as the mean over the seeds with the lowest and highest, and the largest epsilon that a site
spent.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from common.files import read_json_lines
from deploy.configuration import preset_values

RATES = (0.003, 0.01, 0.03)
NOT_PRIVATE = {
    **{key: value for key, value in preset_values("dp").items() if not key.startswith("dp.")},
    "rounds": 40,
    "train.optimiser": "adamw",
    "train.held-back": 0.1,
    "train.bags-per-step": 8,
}


def simulate(sites: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Return the summary of a run, with the share of each level's most frequent class.

    The run is made if its folder holds no summary yet.
    """
    summary = out / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-c", "from deploy.cli.main import main; main()", "simulate"]
        resume = ["--resume"] if (out / "config.toml").exists() else []
        arguments = ["--sites-dir", str(sites), "--out", str(out), "--json", *resume, *options]
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    read: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    confusion = json.loads((out / "confusion.json").read_text(encoding="utf-8"))["argmax"]
    for level, counts in zip(read["levels"], confusion, strict=True):
        images_of_class = [sum(true_class) for true_class in counts]
        level["majority"] = max(images_of_class) / sum(images_of_class)
    return read


def private(sites: Path, out: Path, epsilon: float, seed: int) -> dict[str, Any]:
    """Return the summary of the run at one epsilon."""
    name = f"epsilon-{epsilon:g}-seed-{seed}"
    return simulate(sites, out / name, ["--dp", f"epsilon={epsilon:g}", "--set", f"seed={seed}"])


def not_private(sites: Path, out: Path, seed: int) -> dict[str, Any]:
    """Return the summary of the run without privacy whose held-back bags fit best."""
    runs = {}
    for rate in RATES:
        folder = out / f"none-rate-{rate:g}-seed-{seed}"
        keys = {**NOT_PRIVATE, "train.learning-rate": rate, "seed": seed}
        options = [text for key, value in keys.items() for text in ("--set", f"{key}={json.dumps(value)}")]
        summary = simulate(sites, folder, options)
        scores = [
            event["score"] for event in read_json_lines(folder / "metrics.jsonl") if event["event"] == "bags"
        ]
        runs[min(scores)] = summary
    return runs[min(runs)]


def row(epsilon: float | None, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one point of the curve from the runs of its seeds."""
    spent = [s["epsilon"] for summary in summaries for s in summary["per_site"].values() if epsilon]
    levels = []
    for level in zip(*(summary["levels"] for summary in summaries), strict=True):
        accuracies = [figures["consistent_accuracy"] for figures in level]
        levels.append(
            {
                "name": level[0]["name"],
                "accuracy": statistics.fmean(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "majority": level[0]["majority"],
            }
        )
    worst = max(spent) if spent else None
    return {"epsilon": epsilon, "seeds": len(summaries), "worst_spent": worst, "levels": levels}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over epsilon with a line per level, and the runs without privacy at the right."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    places = range(len(rows))
    for number, level in enumerate(rows[0]["levels"]):
        points = [row["levels"][number] for row in rows]
        means = [point["accuracy"] for point in points]
        spread = [
            [point["accuracy"] - point["lowest"] for point in points],
            [point["highest"] - point["accuracy"] for point in points],
        ]
        drawn = axes.errorbar(places, means, yerr=spread, marker="o", capsize=3, label=level["name"])
        axes.axhline(level["majority"], color=drawn.lines[0].get_color(), linestyle=":", linewidth=1)
    axes.set_xticks(places, [f"{row['epsilon']:g}" if row["epsilon"] else "none" for row in rows])
    axes.set_xlabel("epsilon per site (replace-one bag); none: not private")
    axes.set_ylabel("accuracy on test images (dotted: majority class)")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sites", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[16, 8, 4, 2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs: dict[float | None, list[dict[str, Any]]] = {e: [] for e in [*sorted(options.epsilons), None]}
    for seed in options.seeds:
        for epsilon, summaries in runs.items():
            if epsilon is None:
                summaries.append(not_private(options.sites, options.out, seed))
            else:
                summaries.append(private(options.sites, options.out, epsilon, seed))
    rows = [row(epsilon, summaries) for epsilon, summaries in runs.items()]
    (options.out / "privacy_curve.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    draw(rows, options.out / "privacy_curve.png")
    if options.json:
        print(json.dumps(rows))
        return
    for line in rows:
        levels = ", ".join(f"{v['name']} {v['accuracy']:.3f}" for v in line["levels"])
        print(f"epsilon {line['epsilon'] or 'none'}: {levels} (worst spent {line['worst_spent']})")


if __name__ == "__main__":
    main()
