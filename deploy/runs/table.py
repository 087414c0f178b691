"""Draw the state of a run or a site as tables for the terminal."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from common.run_records import Cause
from deploy.cli.tables import table
from deploy.runs.site_state import SiteState
from deploy.runs.state import (
    Phase,
    RunState,
    Site,
    Stage,
)

_COLOURS = {
    Stage.STARTING: "yellow",
    Stage.RUNNING: "green",
    Stage.WAITING: "yellow",
    Stage.FINISHED: "green",
    Stage.FAILED: "red",
}


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
        parts.append(figures)
        if spent.unconfirmed:
            parts.append(Text(f"{spent.unconfirmed} reserved round(s) never finished; they count as spent"))
    parts += _shared(state.phases, state.bytes_sent, state.bytes_received, state.refusals)
    return Group(*parts)


def as_json(state: RunState | SiteState, run: str = "") -> dict[str, Any]:
    """Return the state as one JSON object, where ``run`` names the run folder at the coordinator."""
    head = {"run": run} if isinstance(state, RunState) else {}
    return {**head, **asdict(state)}


def _site_cells(site: Site) -> tuple[RenderableType, ...]:
    return (
        Text("in", "green") if site.taking_part else Text("out", "red"),
        str(site.updates),
        str(site.last_update or ""),
        _figure(site.bags, "d"),
        _figure(site.loss, ".3f"),
        # A site that has sent updates and states no epsilon has trained without a bound.
        _figure(site.epsilon, ".3f") or ("not private" if site.updates else ""),
        _figure(site.epsilon_left, ".3f"),
    )


def _shared(
    phases: Mapping[str, Phase], sent: int, received: int, refusals: Mapping[Cause, int]
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


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
