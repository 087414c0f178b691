"""Write the privacy-budget report of ledgers and run folders, for ``fedbags report``.

Reads options and prints what the report found. ``deploy.report`` does the work.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.cli import tables
    from deploy.report import files, prose


def report_command(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|LEDGER...", help="A run folder, or the ledger.sqlite of sites."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report; made if it is missing.")],
    pdf: Annotated[
        bool, typer.Option("--pdf", help="Print the page to report.pdf too (needs Chromium).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Write the privacy-budget report of what was spent, for what unit, and whether the records hold up.

    From a RUN it covers the federation as the server knows it: the sites' last statements, checked against
    their ledgers where these lie under the run (simulations), or are named beside it. From a site's own
    LEDGER it covers all that this site ever sent, over all runs. An unfinished run is reported from its
    newest checkpoint, and marked.

    Writes report.html (one file, nothing loaded from elsewhere), report.json with every figure in full, and
    report.schema.json. Exit status 1: the report was written, but a ledger or a statement does not hold up.

    \b
    Examples:
      fedbags report runs/demo --out report
      fedbags report site/ledger.sqlite --out report --pdf
      fedbags report runs/demo north/ledger.sqlite south/ledger.sqlite --out report
    """
    written = files.report(sources, out, pdf)
    if json_:
        typer.echo(json.dumps(written, indent=2))
    else:
        screen = tables.console()
        screen.print(written["headline"], style="bold")
        worst = written["worst"]
        if worst:
            screen.print(
                f"epsilon {prose.epsilon_text(worst['epsilon'])} at delta {worst['delta']:g} "
                f"at site {worst['site']} "
                f"(unit {worst['unit']}, {worst['adjacency']}, {worst['accountant']}, upper bound)",
            )
        for problem in written["problems"]:
            where = "" if problem["row"] is None else f", row {problem['row']}"
            screen.print(f"problem: {problem['site']}{where}: {problem['reason']}", style="red")
        for name in ("html", "json", "pdf"):
            if written[name]:
                screen.print(written[name], soft_wrap=True)
    if written["problems"]:
        raise typer.Exit(1)
