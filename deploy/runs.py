"""Read run folders: a list of them, or the figures of one."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from deploy.tables import console, table
from server.run_folder import RunFolder, read_events


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run below ``folder``: name, state, rounds done, and leaf accuracy where there is one.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}\n`fedbags simulate` makes runs/ here.")
    rows = []
    for config in sorted(folder.glob("*/config.toml")):
        run = RunFolder(config.parent)
        events = list(read_events(run.metrics))
        rounds = max((event["round"] for event in events if event["event"] == "round"), default=0)
        row: dict[str, Any] = {"run": config.parent.name, "rounds": rounds}
        if run.summary.exists():
            summary = read_summary(config.parent)
            row |= {
                "state": "stopped early" if summary.get("stopped_early") else "finished",
                "method": summary["method"],
                "sites": summary["sites"],
                "seconds": summary["seconds"],
                "leaf_accuracy": summary["levels"][-1]["accuracy"] if summary["levels"] else None,
            }
        else:
            failed = bool(events) and events[-1]["event"] == "failed"
            row |= {"state": "failed" if failed else "unfinished"}
        rows.append(row)
    return rows


def print_runs(rows: list[dict[str, Any]], folder: Path) -> None:
    """The list as a table."""
    runs = table(f"runs in {folder}", "run", "state", "method", "sites", "rounds", "seconds", "leaf accuracy")
    for row in rows:
        accuracy = row.get("leaf_accuracy")
        runs.add_row(
            row["run"],
            row["state"],
            row.get("method", ""),
            str(row.get("sites", "")),
            str(row["rounds"]),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{accuracy:.3f}" if accuracy is not None else "",
        )
    console().print(runs)


def read_summary(run: Path) -> dict[str, Any]:
    """The content of a run's summary.json.

    Raises:
        UserError: no run, or one that has not finished.
    """
    path = RunFolder(run).summary
    if not path.exists():
        known = (run / "config.toml").exists()
        raise UserError(
            f"the run has not finished: {run}\nGo on with it: fedbags simulate --out {run} --resume"
            if known
            else f"no run folder: {run}\n`fedbags runs list FOLDER` shows the runs below a folder."
        )
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """Figures per level, per site, on held-back bags, and what was left out."""
    out = console()
    if summary.get("stopped_early"):
        out.print(
            f"stopped early, after round {summary['rounds']}: {summary['stopped_early']}. The model of that "
            "round is kept.",
            style="bold yellow",
        )
    if summary["levels"]:
        levels = table(
            f"{summary['name']}: {summary['method']}, {summary['sites']} sites, {summary['rounds']} rounds "
            f"(model of round {summary['selected_round']}), {summary['seconds']:.0f} s; pooled test images",
            "level", "classes", "accuracy", "balanced", "macro-F1", "consistent path", "times chance",
        )  # fmt: skip
        for level in summary["levels"]:
            levels.add_row(
                level["name"],
                str(level["classes"]),
                *(
                    f"{level[key]:.3f}"
                    for key in ("accuracy", "balanced_accuracy", "macro_f1", "consistent_accuracy")
                ),
                f"{level['accuracy'] * level['classes']:.1f}",
            )
        out.print(levels)
    if summary["bags"]:
        bags = table("held-back bags of the selected model (label-free)", "level", "KL (nats)", "L1")
        for level in summary["bags"]:
            kl = f"{level['kl']:.3f}" if "kl" in level else "withheld (L1 is noised)"
            bags.add_row(level["level"], kl, f"{level['l1']:.3f}")
        out.print(bags)
    names = [level["name"] for level in summary["levels"]]
    sites = table("per site", "site", "bags", "release", "epsilon", *(f"{name} acc." for name in names))
    for site, figures in summary["per_site"].items():
        accuracies = [f"{level['accuracy']:.3f}" for level in figures["levels"]] or ["-"] * len(names)
        epsilon = "not private" if figures["epsilon"] is None else f"{figures['epsilon']:.2f}"
        sites.add_row(site, str(figures["bags"]), figures["release"], epsilon, *accuracies)
    out.print(sites)
    for item in summary["left_out"]:
        out.print(f"left out: round {item['round']}, {item['site']}, {item['phase']}: {item['reason']}")
