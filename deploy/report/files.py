"""Write the privacy-budget report of ledgers and run folders as report.json, one page of HTML, and a PDF.

This is the whole way of a report: ``evidence`` reads the sources, ``figures`` has ``accounts`` compute every
epsilon, ``prose`` writes the texts, and ``page`` makes the page from report.json alone.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from common.files import replacing
from deploy.report.accounts import Accountants
from deploy.report.evidence import collect, expected_sites
from deploy.report.figures import assemble, worst_of
from deploy.report.model import Problem, Provenance, Report, json_schema
from deploy.report.page import render
from deploy.report.prose import (
    NOT_COVERED,
    ReportContext,
    cautions,
    disclosures,
    headline,
    status_of,
    summary,
)

_JSON, _HTML, _SCHEMA, _PDF = "report.json", "report.html", "report.schema.json", "report.pdf"
_PACKAGES = ("fedbags", "dp-accounting", "opacus", "opendp", "torch", "numpy", "scipy", "flwr")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PRINT_SECONDS = 120


def report(sources: Sequence[Path], out: Path, pdf: bool = False) -> dict[str, Any]:
    """Write the report of these sources into the folder ``out``.

    Returns:
        ``{html, json, schema, pdf, status, headline, worst, problems}``: paths as texts (pdf may be None),
        and what the report found. The report is written also where there are problems.

    Raises:
        UserError: a source is missing, unreadable or of an unknown schema; ``out`` cannot be written; a PDF
            is wanted and there is no Chromium.
        RunError: Chromium could not print the page.
    """
    # Looked for first, because computing the report of many sites and rounds takes time.
    browser = _find_browser() if pdf else None
    if pdf and browser is None:
        raise UserError(
            f"--pdf needs Chromium ({', '.join(_BROWSERS)}) on the PATH.\n"
            "Install it, or leave --pdf out and print report.html from any browser."
        )
    made = _build(sources, _now(), {name: _version(name) for name in _PACKAGES})
    texts = {
        _JSON: made.model_dump_json(indent=2) + "\n",
        _SCHEMA: json.dumps(json_schema(), indent=2) + "\n",
        _HTML: render(made),
    }
    printed = _write(out, texts, browser)
    return {
        "html": str(out / _HTML),
        "json": str(out / _JSON),
        "schema": str(out / _SCHEMA),
        "pdf": str(out / _PDF) if printed else None,
        **made.model_dump(mode="json", include={"status", "headline", "worst", "problems"}),
    }


def _find_browser() -> str | None:
    """Return the path of a Chromium on the PATH, or None."""
    return next((found for name in _BROWSERS if (found := shutil.which(name))), None)


def _write(out: Path, texts: dict[str, str], browser: str | None) -> bool:
    """Write all files of the report aside first, and then put them in place.

    A reader never meets half a report.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as name:
            scratch = Path(name)
            for file, text in texts.items():
                (scratch / file).write_text(text, encoding="utf-8")
            if browser is not None:
                _print(browser, scratch)
            made = sorted(scratch.glob("report.*"))
            with replacing(*(out / path.name for path in made)) as temporary:
                for path, copy in zip(made, temporary, strict=True):
                    shutil.copyfile(path, copy)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out}: {error.strerror or error}\n"
            "Choose a folder that you may write to, with space left, with --out."
        ) from error
    return browser is not None


def _print(browser: str, folder: Path) -> None:
    """Print the page in ``folder`` to a PDF in the same folder.

    Raises:
        RunError: the browser did not print it.
    """
    with tempfile.TemporaryDirectory(prefix="fedbags-chromium-") as profile:
        command = [
            # Without update checks and other traffic, and with a profile of its own instead of the user's.
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={folder / _PDF}",
            (folder / _HTML).resolve().as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PRINT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{browser} did not print the report within {_PRINT_SECONDS} s") from error
    if not (folder / _PDF).is_file():
        raise RunError(f"{browser} did not print the report: {done.stderr.strip()[-300:]}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _build(sources: Sequence[Path], created: str, packages: Mapping[str, str]) -> Report:
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
    context = ReportContext(
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
        run=context.run,
        finished=context.finished,
        rounds=context.rounds,
        stopped_early=context.stopped_early,
        status=status_of(context.sites),
        headline=headline(context),
        summary=summary(context),
        not_covered=NOT_COVERED,
        worst=worst,
        problems=tuple(problems),
        cautions=cautions(context),
        settings=context.settings,
        sites=sites,
        left_out=tuple(found.left_out),
        audit=context.audit,
        disclosures=disclosures(context),
        provenance=context.provenance,
    )


def _name(path: Path) -> str:
    """Return the end of a path, which identifies it without the folders of this machine."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.is_file() else whole.name
