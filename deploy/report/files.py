"""Write the privacy-budget report of ledgers and run folders as report.json, one page of HTML, and a PDF."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from common.files import replacing
from deploy.report.model import json_schema
from deploy.report.render import build, render

JSON, HTML, SCHEMA, PDF = "report.json", "report.html", "report.schema.json", "report.pdf"
PACKAGES = ("fedbags", "dp-accounting", "opacus", "opendp", "torch", "numpy", "scipy", "flwr")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PRINT_SECONDS = 120


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
    browser = find_browser() if pdf else None
    if pdf and browser is None:
        raise UserError(
            f"--pdf needs Chromium ({', '.join(BROWSERS)}) on the PATH.\n"
            "Install it, or leave --pdf out and print report.html from any browser."
        )
    made = build(sources, _now(), {name: _version(name) for name in PACKAGES})
    texts = {
        JSON: made.model_dump_json(indent=2) + "\n",
        SCHEMA: json.dumps(json_schema(), indent=2) + "\n",
        HTML: render(made),
    }
    printed = _write(out, texts, browser)
    return {
        "html": str(out / HTML),
        "json": str(out / JSON),
        "schema": str(out / SCHEMA),
        "pdf": str(out / PDF) if printed else None,
        **made.model_dump(mode="json", include={"status", "headline", "worst", "problems"}),
    }


def find_browser() -> str | None:
    """Return the path of a Chromium on the PATH, or None."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


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
            f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={folder / PDF}",
            (folder / HTML).resolve().as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PRINT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{browser} did not print the report within {PRINT_SECONDS} s") from error
    if not (folder / PDF).is_file():
        raise RunError(f"{browser} did not print the report: {done.stderr.strip()[-300:]}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
