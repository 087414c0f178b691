"""Show runs and sites as tables on the terminal.

Lists of run folders, the figures of one finished run or of two, and the present state of a run or a site.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.text import Text

from common.config import RunConfig
from common.errors import UserError
from common.run_records import Cause, LevelFigures, RunSummary
from deploy.cli.terminal import console, table
from deploy.runs.reading import PhaseTimes, RunState, SiteProgress, Stage, fold, read_summary, run_events
from deploy.runs.site_state import SiteState
from server.run_folder import RunFolder

_COLOURS = {
    Stage.STARTING: "yellow",
    Stage.RUNNING: "green",
    Stage.WAITING: "yellow",
    Stage.FINISHED: "green",
    Stage.FAILED: "red",
}

_LONGEST_NAME = 36
"""Characters of a run's name that fit on one line of 80 with the figures; longer ones are folded."""
_FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1"}


def run_table(state: RunState, run: str, now: float) -> RenderableType:
    """Return the table of a run, at the coordinator.

    Args:
        state: what is known of it.
        run: the name of its folder; empty where there is none yet.
        now: seconds since 1970.
    """
    if not run:
        return Text("no run yet")
    head = Text.assemble((run, "bold"), "  ", (state.stage.value, _COLOURS[state.stage]))
    head.append(f"  round {state.round} of {state.rounds or '?'}")
    if state.loss is not None:
        head.append(f"  loss {state.loss:.3f}")
    if state.first:
        head.append(f"  {_duration((state.last if state.ended else now) - state.first)}")
        head.append("" if state.ended else f", last sign {_duration(now - state.last)} ago")
    parts: list[RenderableType] = [head]
    if state.missing:
        names = ", ".join(state.waiting_for) or "any"
        parts.append(Text(f"waiting for {state.missing} more site(s), of: {names}", style="yellow"))
    if state.skipped:
        rounds = ", ".join(map(str, state.skipped))
        parts.append(Text(f"rounds skipped, as the sum of sites was lost: {rounds}", style="yellow"))
    if state.stopped_early:
        parts.append(Text(f"stopped early: {state.stopped_early}", style="yellow"))
    if state.failure:
        parts.append(Text(state.failure, style="red"))
    if state.sites:
        columns = ("", "updates", "last round", "bags", "loss", "epsilon spent", "left")
        title = f"sites: {state.count(taking_part=True)} in, {state.count(taking_part=False)} out"
        sites = table(title, "site", *columns)
        for name, site in sorted(state.sites.items()):
            sites.add_row(name, *_site_cells(site))
        parts.append(sites)
        out = {name: site for name, site in sorted(state.sites.items()) if not site.taking_part}
        parts += [Text(f"{name} is out: {site.why_not}") for name, site in out.items()]
    parts += [Text(f"{who} was not admitted: {why}") for who, why in sorted(state.turned_away.items())]
    parts += _shared(state.phases, state.bytes_sent, state.bytes_received, state.refusals)
    return Group(*parts)


def site_table(state: SiteState, now: float) -> RenderableType:
    """Return the table of a site, at the site, where ``now`` is in seconds since 1970."""
    head = Text.assemble((state.site, "bold"))
    if state.messages:
        head.append(f"  round {state.round}, {state.messages} messages answered")
        head.append(f", the last one {_duration(now - state.last)} ago")
    else:
        head.append("  no message answered yet")
    parts: list[RenderableType] = [head]
    if state.ledger_fault:
        parts.append(Text(state.ledger_fault, style="red"))
    if (spent := state.spending) is not None:
        figures = table("privacy budget, all runs", "", "epsilon")
        figures.add_row(f"cap at delta {spent.delta:g}", f"{spent.cap:.4g}")
        figures.add_row("spent", f"{spent.epsilon:.4g}")
        figures.add_row("left", f"{spent.left:.4g}")
        if spent.own_share is not None:
            figures.add_row("spent, by its own share of noise alone", f"{spent.own_share:.4g}")
        parts.append(figures)
        if spent.unconfirmed:
            parts.append(Text(f"{spent.unconfirmed} reserved round(s) never finished; they count as spent"))
    parts += _shared(state.phases, state.bytes_sent, state.bytes_received, state.refusals)
    return Group(*parts)


def as_json(state: RunState | SiteState, run: str = "") -> dict[str, Any]:
    """Return the state as one JSON object, where ``run`` names the run folder at the coordinator."""
    head = {"run": run} if isinstance(state, RunState) else {}
    return {**head, **asdict(state)}


def _site_cells(site: SiteProgress) -> tuple[RenderableType, ...]:
    return (
        Text("in", "green") if site.taking_part else Text("out", "red"),
        str(site.updates),
        str(site.last_update or ""),
        _number(site.bags, "d"),
        _number(site.loss, ".3f"),
        # A site that has sent updates and states no epsilon has trained without a bound.
        _number(site.epsilon, ".3f") or ("not private" if site.updates else ""),
        _number(site.epsilon_left, ".3f"),
    )


def _shared(
    phases: Mapping[str, PhaseTimes], sent: int, received: int, refusals: Mapping[Cause, int]
) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if phases:
        title = f"{sent / 2**20:.1f} MiB sent, {received / 2**20:.1f} MiB received"
        seconds = table(title, "phase", "times", "mean (s)", "last (s)")
        for name, phase in phases.items():
            seconds.add_row(name, str(phase.count), f"{phase.seconds / phase.count:.2f}", f"{phase.last:.2f}")
        parts.append(seconds)
    if refusals:
        counts = ", ".join(f"{cause} {count}" for cause, count in sorted(refusals.items()))
        parts.append(Text(f"refused or not used: {counts}"))
    return parts


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _known(level: LevelFigures | None, key: str) -> float | None:
    """Return a figure of a level of a summary, or None where suppressed counts leave it open."""
    return None if level is None or level.suppressed else getattr(level, key)


def bounds_of(level: LevelFigures | None, key: str = "accuracy") -> list[float] | None:
    """Return the two figures between which an accuracy of a level lies, or None where it is known."""
    bounds = getattr(level.suppressed, key, None) if level else None
    return None if bounds is None else list(bounds)


def share_text(value: float | None, bounds: Sequence[float] | None = None, none: str = "-") -> str:
    """Return a share as text, such as ``0.645``, or its bounds as text, such as ``0.61-0.68``."""
    if bounds is not None:
        low, high = bounds
        # Rounded outwards, so that the true figure lies between the two that are printed.
        return f"{math.floor(low * 100) / 100:.2f}-{math.ceil(high * 100) / 100:.2f}"
    return none if value is None else f"{value:.3f}"


def suppression(level: LevelFigures) -> str:
    """Return what sites suppressed of a level as text, such as ``14 cells below 5 suppressed``.

    Empty if they suppressed nothing.
    """
    found = level.suppressed
    return f"{found.cells} cells below {found.below} suppressed" if found else ""


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Return a row for every run below ``folder``.

    A row has name, state, rounds done, and leaf accuracy where it is known. Where sites suppressed small
    counts it is not, and ``leaf_accuracy_bounds`` says between what it lies.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}\n`fedbags simulate` makes runs/ here.")
    rows = []
    for config in sorted(folder.glob("*/config.toml")):
        run = RunFolder(config.parent)
        state = fold(run_events(config.parent))
        row: dict[str, Any] = {"run": config.parent.name, "rounds": state.round}
        if run.summary.exists():
            summary = read_summary(config.parent)
            leaf = summary.levels[-1] if summary.levels else None
            row |= {
                "state": "stopped early" if summary.stopped_early else "finished",
                "method": summary.method,
                "sites": summary.sites,
                "seconds": summary.seconds,
                "leaf_accuracy": _known(leaf, "accuracy"),
                "leaf_accuracy_bounds": bounds_of(leaf),
            }
        else:
            row |= {"state": "failed" if state.stage is Stage.FAILED else "unfinished"}
        rows.append(row)
    return rows


def print_runs(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print the list of runs.

    A run's name is never cut, since other commands take it.
    """
    runs = table(f"runs in {folder}", "run", "state", "method", "sites", "rounds", "seconds", "leaf acc.")
    runs.box, runs.padding, runs.show_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    for column in runs.columns:
        column.overflow = "fold"
    runs.columns[0].no_wrap = max((len(row["run"]) for row in rows), default=0) <= _LONGEST_NAME
    for column in (runs.columns[1], *runs.columns[3:]):
        column.no_wrap = True
    for row in rows:
        runs.add_row(
            row["run"],
            row["state"],
            row.get("method", ""),
            str(row.get("sites", "")),
            str(row["rounds"]),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            share_text(row.get("leaf_accuracy"), row.get("leaf_accuracy_bounds"), none=""),
        )
    console().print(runs)


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return two runs side by side.

    ``{runs, differences: [{key, values}], levels: [{level, accuracy, balanced_accuracy, macro_f1,
    accuracy_bounds}], epsilon, rounds, seconds}``; every list has the first run's value and the second's.
    Epsilon is the largest of the sites', None where a run was not private, and a figure that one run does not
    have is None there. Bounds stand in for the figures of a level of which sites suppressed small counts.

    Raises:
        UserError: one is no run, or has not finished.
    """
    summaries = [read_summary(run) for run in (first, second)]
    one, other = (RunConfig.from_toml(RunFolder(run).config).to_flat() for run in (first, second))
    found = [{level.name: level for level in summary.levels} for summary in summaries]
    return {
        "runs": [str(first), str(second)],
        "differences": [
            {"key": key, "values": [one[key], other[key]]}
            for key in one
            # Any two runs differ in these two, whatever their settings.
            if one[key] != other[key] and key not in ("run-dir", "resume")
        ],
        "levels": [
            {
                "level": name,
                **{key: [_known(levels.get(name), key) for levels in found] for key in _FIGURES},
                "accuracy_bounds": [bounds_of(levels.get(name)) for levels in found],
            }
            for name in dict.fromkeys(name for levels in found for name in levels)
        ],
        "epsilon": [_largest_epsilon(summary) for summary in summaries],
        "rounds": [summary.rounds for summary in summaries],
        "seconds": [summary.seconds for summary in summaries],
    }


def print_comparison(result: dict[str, Any]) -> None:
    """Print the result of compare_runs."""
    out, (first, second) = console(), result["runs"]
    out.print(f"A: {first}", soft_wrap=True)
    out.print(f"B: {second}", soft_wrap=True)
    figures = table("figures", "", "A", "B")
    for level in result["levels"]:
        for key, name in _FIGURES.items():
            bounds = level["accuracy_bounds"] if key == "accuracy" else (None, None)
            figures.add_row(f"{level['level']}, {name}", *map(share_text, level[key], bounds))
    epsilons = ("not private" if value is None else f"{value:.3f}" for value in result["epsilon"])
    figures.add_row("largest epsilon of a site", *epsilons)
    figures.add_row("rounds", *map(str, result["rounds"]))
    figures.add_row("seconds", *(f"{value:.0f}" for value in result["seconds"]))
    out.print(figures)
    if not result["differences"]:
        out.print("their configurations are the same")
        return
    settings = table("settings that differ", "key", "A", "B")
    settings.columns[0].no_wrap = True
    for column in settings.columns[1:]:
        column.overflow = "fold"
    for row in result["differences"]:
        settings.add_row(row["key"], *map(str, row["values"]))
    out.print(settings)


def _largest_epsilon(summary: RunSummary) -> float | None:
    spent = [site.epsilon for site in summary.per_site.values() if site.epsilon is not None]
    return max(spent, default=None)


def _trivial_accuracies(run: Path) -> list[float]:
    """Return the accuracy per level of always naming the most frequent class of a run's test images.

    Empty where the sites kept their confusion counts.
    """
    path = RunFolder(run).confusion
    if not path.exists():
        return []
    matrices = json.loads(path.read_text(encoding="utf-8"))["argmax"]
    rows = [[sum(row) for row in matrix] for matrix in matrices]
    return [max(counts) / sum(counts) for counts in rows if sum(counts)]


def _say_baseline(summary: RunSummary, run: Path) -> None:
    """Print what the accuracies are to be compared with, and why the demo's are low."""
    out, trivial = console(), _trivial_accuracies(run)
    if len(trivial) == len(summary.levels) and trivial:
        named = zip(summary.levels, trivial, strict=True)
        shares = ", ".join(f"{level.name} {share:.3f}" for level, share in named)
        shown = " (of the cells shown)" if any(map(suppression, summary.levels)) else ""
        out.print(f"Always naming the most frequent class would get{shown}: {shares}.")
    sites = RunConfig.from_toml(RunFolder(run).config).sites_dir
    if sites and Path(sites) == run.resolve() / "sites":
        out.print(
            "The drawn hospitals are small and their rounds few, to take two minutes: the figures show that "
            "it learns, not how well. More --rounds learn more."
        )


def print_summary(summary: RunSummary, run: Path | None = None) -> None:
    """Print figures per level, per site, on held-back bags, and what was left out.

    With ``run``, the folder of the run, the accuracies of the most frequent class are printed as well.
    """
    out = console()
    if summary.stopped_early:
        out.print(
            f"stopped early, after round {summary.rounds}: {summary.stopped_early}. The model of that "
            "round is kept.",
            style="bold yellow",
        )
    heading = (
        f"{summary.name}: {summary.method}, {summary.sites} sites, {summary.rounds} rounds "
        f"(model of round {summary.selected_round}), {summary.seconds:.0f} s"
    )
    if not summary.levels:
        out.print(f"{heading}; no labelled test images")
    else:
        levels = table(
            f"{heading}; pooled test images",
            "level", "classes", "accuracy", "balanced", "macro-F1", "consistent path", "times chance",
        )  # fmt: skip
        for level in summary.levels:
            levels.add_row(
                level.name,
                str(level.classes),
                *(
                    share_text(_known(level, key), bounds_of(level, key))
                    for key in ("accuracy", "balanced_accuracy", "macro_f1", "consistent_accuracy")
                ),
                "-".join(f"{value * level.classes:.1f}" for value in bounds_of(level) or [level.accuracy]),
            )
        out.print(levels)
        for level in summary.levels:
            if cells := suppression(level):
                out.print(
                    f"{level.name}: {cells} by sites, so its accuracies lie between the two figures, and "
                    "the others cannot be told."
                )
        if run is not None:
            _say_baseline(summary, run)
    if summary.bags:
        bags = table("held-back bags of the selected model (label-free)", "level", "KL (nats)", "L1")
        for mean in summary.bags:
            kl = "withheld (L1 is noised)" if mean.kl is None else f"{mean.kl:.3f}"
            bags.add_row(mean.level, kl, "withheld" if mean.l1 is None else f"{mean.l1:.3f}")
        out.print(bags)
    names = [level.name for level in summary.levels]
    sites = table("per site", "site", "bags", "release", "epsilon", *(f"{name} acc." for name in names))
    for site, figures in summary.per_site.items():
        accuracies = [share_text(_known(level, "accuracy"), bounds_of(level)) for level in figures.levels]
        epsilon = "not private" if figures.epsilon is None else f"{figures.epsilon:.2f}"
        sites.add_row(site, str(figures.bags), figures.release, epsilon, *(accuracies or ["-"] * len(names)))
    out.print(sites)
    for item in summary.left_out:
        out.print(f"left out: round {item.round}, {item.site}, {item.phase}: {item.reason}")
