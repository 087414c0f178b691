"""Render report.json as one self-contained HTML page, without computing any figure.

Each figure stands in an element whose ``data-field`` is its path in the JSON and whose ``data-value`` is
its exact value, so that anybody can compare the page with the data.

Build the whole report from its sources.

The figures come from ``assemble``, and the texts from ``prose`` and ``disclosures``.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.text import visible_lines
from deploy.report.accounts import Accountants, disclosures
from deploy.report.assemble import assemble, worst_of
from deploy.report.collect import collect, expected_sites
from deploy.report.model import Problem, Provenance, Report, Site
from deploy.report.plots import curve_plot, spending_plot
from deploy.report.prose import (
    NOT_COVERED,
    Told,
    cautions,
    headline,
    status_of,
    summary,
)

MOST_ROWS = 2000
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
            path=field_path,
            plots={name: _plots(site) for name, site in report.sites.items()},
            show_rows=rows <= MOST_ROWS,
        )
    )


def field_path(*keys: str | int) -> str:
    """Return the path of a figure, in which a dot within a name is written %2E."""
    return ".".join(str(key).replace("%", "%25").replace(".", "%2E") for key in keys)


EPSILONS = frozenset(
    {
        "epsilon", "confirmed", "left", "cap", "add_remove", "opacus_rdp", "without_amplification",
        "epsilon_alone", "budget_left", "replace_one",
    }
)  # fmt: skip
"""Fields that hold an epsilon. Nobody reads more of one than its thousandths; report.json has them all."""


def shown(value: Any, name: str = "") -> str:
    """Return a figure as the page shows it.

    It has four digits, and no exponent where a few zeros do.

    Args:
        value: of any type.
        name: of its field; see EPSILONS.
    """
    if not isinstance(value, float):
        return str(value)
    if name in EPSILONS and 0 < value < 1e-3:
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
            field_path(*keys), absent
        )
    # repr is the shortest text that reads back as exactly the same number.
    exact = repr(data) if isinstance(data, float) else str(data)
    return Markup('<span data-field="{}" data-value="{}">{}</span>').format(
        field_path(*keys), exact, visible_lines(shown(data, str(keys[-1])))
    )


def _plots(site: Site) -> dict[str, Markup]:
    plots = {}
    if len(site.spending) > 1:
        points = [(float(point.round), point.epsilon) for point in site.spending]
        # Unescaped, because a plot holds numbers and constant words only.
        plots["spending"] = Markup(spending_plot(points, site.cap, site.confirmed))
    if site.curve and site.delta is not None:
        curve = [(point.delta, point.epsilon) for point in site.curve]
        plots["curve"] = Markup(curve_plot(curve, site.delta))
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


def build(sources: Sequence[Path], created: str, packages: Mapping[str, str]) -> Report:
    """Return the report of these sources.

    Args:
        sources: run folders and ledger files.
        created: when, as an ISO time.
        packages: versions to write down.

    Raises:
        UserError: see ``collect``.
    """
    # The workers start before the sources are read, so that their imports cost no time of their own.
    with Accountants(expected_sites(sources)) as accountants:
        found = collect(sources)
        sites, problems = assemble(found, accountants)
    # Of several runs no single name, number of rounds or audit holds for the whole report.
    run = found.runs[0] if len(found.runs) == 1 else None
    worst = worst_of(sites.values())
    # The audit's bound is for add/remove and so lies below the replace-one epsilon of a correct guarantee.
    if run and run.audit and worst and run.audit.lower_bound > worst.epsilon:
        reason = (
            f"the audit shows epsilon to be at least {run.audit.lower_bound:.4g}, more than the "
            f"{worst.epsilon:.4g} that is claimed: what ran is not what was accounted for"
        )
        problems.append(Problem(site=worst.site, row=None, reason=reason))
    told = Told(
        run=run.name if run else None,
        rounds=run.rounds if run else None,
        finished=run.finished if run else None,
        stopped_early=run.stopped_early if run else None,
        sites=list(sites.values()),
        worst=worst,
        problems=problems,
        settings=run.settings if run else None,
        audit=run.audit if run else None,
        provenance=Provenance(
            created=created,
            packages=dict(packages),
            code_version=run.code.get("version") if run else None,
            code_commit=run.code.get("commit") if run else None,
            config_sha256=run.config_sha256 if run else None,
            sources=tuple(_name(path) for path in sources),
        ),
    )
    return Report(
        title=run.name if run else " and ".join(list(sites)[:3]) + (" and others" if len(sites) > 3 else ""),
        scope="federation" if run or len(sites) > 1 else "site",
        run=told.run,
        finished=told.finished,
        rounds=told.rounds,
        stopped_early=told.stopped_early,
        status=status_of(told.sites),
        headline=headline(told),
        summary=summary(told),
        not_covered=NOT_COVERED,
        worst=worst,
        problems=tuple(problems),
        cautions=cautions(told),
        settings=told.settings,
        sites=sites,
        left_out=tuple(found.left_out),
        audit=told.audit,
        disclosures=disclosures(told),
        provenance=told.provenance,
    )


def _name(path: Path) -> str:
    """Return the end of a path, which identifies it without the folders of this machine."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.is_file() else whole.name
