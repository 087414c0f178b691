"""Build the whole report from its sources.

The figures come from ``assemble``, and the texts from ``prose`` and ``disclosures``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.report.accounts import Accountants
from deploy.report.assemble import assemble, worst_of
from deploy.report.collect import collect, expected_sites
from deploy.report.disclosures import disclosures
from deploy.report.model import Problem, Provenance, Report
from deploy.report.prose import NOT_COVERED, Told, cautions, headline, status_of, summary


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
        central=run.central if run else None,
        audit=told.audit,
        disclosures=disclosures(told),
        provenance=told.provenance,
    )


def _name(path: Path) -> str:
    """Return the end of a path, which identifies it without the folders of this machine."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.is_file() else whole.name
