"""Make one self-contained HTML page from report.json, with plots as SVG, without computing any figure.

Each figure stands in an element whose ``data-field`` is its path in the JSON and whose ``data-value`` is
its exact value, so that anybody can compare the page with the data. SVG stays sharp on paper and takes its
colours from the page's style sheet; Matplotlib would take a second to load and 40 kB a plot.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.text import visible_lines
from deploy.report.model import Report, Site

_MOST_ROWS = 2000
"""Ledger rows that the page shows; the JSON file holds all."""


def render(report: Report) -> str:
    """Return the page of a report."""
    data = report.model_dump(mode="json")
    rows = sum(len(site.rows) for site in report.sites.values())
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            r=data,
            value=functools.partial(_value, data),
            path=_field_path,
            plots={name: _plots(site) for name, site in report.sites.items()},
            show_rows=rows <= _MOST_ROWS,
        )
    )


def _field_path(*keys: str | int) -> str:
    """Return the path of a figure, in which a dot within a name is written %2E."""
    return ".".join(str(key).replace("%", "%25").replace(".", "%2E") for key in keys)


_EPSILONS = frozenset(
    {
        "epsilon", "confirmed", "left", "cap", "add_remove", "opacus_rdp", "without_amplification",
        "epsilon_alone", "budget_left", "replace_one", "own_share", "own_share_cap",
    }
)  # fmt: skip
"""Fields that hold an epsilon. Nobody reads more of one than its thousandths; report.json has them all."""


def _shown(value: Any, name: str = "") -> str:
    """Return a figure as the page shows it.

    It has four digits, and no exponent where a few zeros do.

    Args:
        value: of any type.
        name: of its field; see ``_EPSILONS``.
    """
    if not isinstance(value, float):
        return str(value)
    if name in _EPSILONS and 0 < value < 1e-3:
        return "< 0.001"
    text = f"{value:.4g}"
    if "e-" in text and value >= 1e-7:
        decimals = int(text.partition("e-")[2]) + len(text.partition("e")[0].replace(".", "")) - 1
        return f"{value:.{decimals}f}"
    return text


def _value(data: Any, *keys: str | int, absent: str = "not recorded") -> Markup:
    """Return the figure at a path of the JSON as an element that names that path."""
    for key in keys:
        data = data[key]
    if data is None:
        return Markup('<span class="absent" data-field="{}" data-value="null">{}</span>').format(
            _field_path(*keys), absent
        )
    # repr is the shortest text that reads back as exactly the same number.
    exact = repr(data) if isinstance(data, float) else str(data)
    return Markup('<span data-field="{}" data-value="{}">{}</span>').format(
        _field_path(*keys), exact, visible_lines(_shown(data, str(keys[-1])))
    )


def _plots(site: Site) -> dict[str, Markup]:
    plots = {}
    if len(site.spending) > 1:
        points = [(float(point.round), point.epsilon) for point in site.spending]
        # Unescaped, because a plot holds numbers and constant words only.
        plots["spending"] = Markup(_spending_plot(points, site.cap, site.confirmed))
    if site.curve and site.delta is not None:
        curve = [(point.delta, point.epsilon) for point in site.curve]
        plots["curve"] = Markup(_curve_plot(curve, site.delta))
    return plots


def _finalized(value: Any) -> Any:
    """Return what the template prints, with control characters of a text made visible as on a terminal."""
    # Names and reasons come from sites, and could otherwise hide or reorder text on the page.
    return visible_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Autoescape keeps a site's name from adding markup, StrictUndefined keeps a missing figure from being
        # empty.
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Makes any name a valid id of an element. Character codes keep different names apart.
    environment.filters["anchor"] = lambda name: "".join(
        c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in str(name)
    )
    environment.filters["day"] = lambda text: escape(str(text).replace("T", " ").removesuffix("+00:00"))
    return environment


_WIDTH, _HEIGHT = 380.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 14.0, 38.0

_Points = Sequence[tuple[float, float]]


def _spending_plot(points: _Points, cap: float | None, confirmed: float | None) -> str:
    """Return a plot of epsilon over rounds, with the cap as a dashed line.

    What was reserved and not confirmed is drawn as a band.
    """
    highest = max([epsilon for _, epsilon in points] + ([cap] if cap is not None else []))
    last_round, last = points[-1]
    # At least one round wide, and with some height, so that a plot of no spending has a scale.
    x = _Axis(0, max(last_round, 1), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(0, highest * 1.08 or 1, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x, y, _ticks(x, whole=True), _ticks(y), "round")
    if confirmed is not None and confirmed < last:
        top, height = y.at(last), y.at(confirmed) - y.at(last)
        parts.append(
            f'<rect class="reserved" x="{_LEFT}" y="{top:.1f}" width="{_WIDTH - _LEFT - _RIGHT}" '
            f'height="{height:.1f}"/><text class="note" x="{_LEFT + 6}" y="{max(top - 4, _TOP + 8):.1f}">'
            "reserved, not confirmed</text>"
        )
    parts.append(_line(x, y, points))
    if cap is not None:
        height, end = y.at(cap), _WIDTH - _RIGHT
        parts.append(
            f'<line class="cap" x1="{_LEFT}" x2="{end}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text class="note" x="{end}" y="{height - 4:.1f}" text-anchor="end">cap</text>'
        )
    return _svg("Epsilon spent over the rounds of training, with the cap", parts)


def _curve_plot(points: _Points, delta: float) -> str:
    """Return a plot of epsilon over delta on a logarithmic axis, with a mark at the delta of record."""
    logs = [(math.log10(value), epsilon) for value, epsilon in points]
    x = _Axis(min(place for place, _ in logs), max(place for place, _ in logs), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(0, max(epsilon for _, epsilon in logs) * 1.08 or 1, _HEIGHT - _BOTTOM, _TOP)
    exponents = range(math.ceil(x.low), math.floor(x.high) + 1, 2)
    labels = [(float(exponent), f"1e{exponent}") for exponent in exponents]
    parts = _frame(x, y, labels, _ticks(y), "delta")
    parts.append(_line(x, y, sorted(logs)))
    epsilon = dict(points)[delta]
    parts.append(
        f'<circle class="mark" cx="{x.at(math.log10(delta)):.1f}" cy="{y.at(epsilon):.1f}" r="4.5"/>'
    )
    return _svg("Epsilon over delta for the same spending", parts)


class _Axis:
    """Map values to places on the page."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(axis: _Axis, *, whole: bool = False) -> list[tuple[float, str]]:
    """Return four to eight round numbers with their labels."""
    step = 10.0 ** math.floor(math.log10(axis.high - axis.low))
    while (axis.high - axis.low) / step < 4:
        step /= 2
    if whole:
        step = max(1.0, math.ceil(step))
    count = math.floor((axis.high - axis.low) / step + 1e-9)
    return [(axis.low + number * step, f"{axis.low + number * step:g}") for number in range(count + 1)]


def _frame(
    x: _Axis, y: _Axis, ticks: Sequence[tuple[float, str]], rows: Sequence[tuple[float, str]], below: str
) -> list[str]:
    floor = _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y.at(v):.1f}" y2="{y.at(v):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y.at(v) + 4:.1f}" text-anchor="end">{label}</text>'
        for v, label in rows
    ]
    parts += [
        f'<text x="{x.at(v):.1f}" y="{floor + 15}" text-anchor="middle">{label}</text>' for v, label in ticks
    ]
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{below}</text>'
    )
    middle = (_TOP + floor) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">epsilon</text>'
    )
    return parts


def _line(x: _Axis, y: _Axis, points: _Points) -> str:
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    dots = "".join(f'<circle class="dot" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2"/>' for a, b in points)
    return f'<polyline class="line" points="{path}"/>{dots if len(points) <= 30 else ""}'


def _svg(title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    head = f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{title}">'
    return f"{head}<title>{title}</title>{body}</svg>"
