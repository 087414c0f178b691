"""Show, check and export a site's privacy ledger, and report on ledgers and runs.

For ``fedbags ledger`` and ``fedbags report``. Reads options and prints. The ledger itself is ``client``'s,
the report ``deploy.report``'s.
"""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UserError
from deploy.cli import Json, print_json
from deploy.lazy import lazy_imports

with lazy_imports():
    from client import site as site_file
    from client.data import tables as site_tables
    from client.ledger import anchor as ledger_anchor
    from client.ledger import check
    from client.ledger import ledger as site_ledger
    from client.ledger import state as ledger_state
    from common.privacy import events
    from deploy.cli import terminal
    from deploy.report import files, prose, spending

app = typer.Typer(
    help="A site's privacy ledger: what was spent, under which cap, and whether the file can be believed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_File = Annotated[Path, typer.Argument(help="A site's ledger.sqlite.")]
_Kit = Annotated[
    Path | None, typer.Option(help="The site's kit, where its ledger has its second anchor; none: beside it.")
]
_Ledger = Annotated[Path | None, typer.Option(help="Its ledger; SITE_FOLDER/ledger.sqlite if not given.")]


@app.command()
def show(file: _File) -> None:
    """Show what was spent, what is left, and every row of the ledger.

    Example: fedbags ledger show runs/demo/sites/site-1/ledger.sqlite
    """
    book = ledger_state.LedgerState.read(file)
    spent, add_remove, cap = book.spent(), book.spent(events.Adjacency.ADD_REMOVE), book.cap
    rows = terminal.table(f"ledger of {book.site}", "row", "what", "run", "round", "event", "time (UTC)")
    for row in spending.rows_of(book):
        time = row.time.replace("T", " ").removesuffix("+00:00")
        rows.add_row(str(row.row), row.kind, row.run, str(row.round or ""), row.what, time)
    out = terminal.console()
    out.print(rows)
    out.print(f"unit: {events.UNIT_EXPLANATION}")
    out.print(
        f"spent: epsilon {spent:.4g} of {cap.epsilon:g} (replace-one) at delta {cap.delta:g}; "
        f"left: {max(cap.epsilon - spent, 0):.4g}; under add/remove: {add_remove:.4g}"
    )
    if (own := book.spent_alone()) is not None:
        of = "" if cap.alone is None else f" of {cap.alone:g}"
        out.print(
            f"by its own shares of noise alone, should the masks fail: epsilon {own:.4g}{of} "
            f"(replace-one) at delta {cap.delta:g}"
        )
    out.print("Upper bounds by dp-accounting's PLD accountant, over all runs and data versions.")
    out.print(f"head: {book.head}", soft_wrap=True)


@app.command()
def verify(
    file: _File,
    head: Annotated[
        str | None, typer.Option(help="Ledger head of a statement that the server holds, in hexadecimal.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Whose ledger it should be.")] = None,
    kit: _Kit = None,
    json_: Json = False,
) -> None:
    """Check that no row was edited, deleted, reordered or rolled back.

    Exit status 1 if one was. An older copy put back shows against the site's second anchor (in the kit, or
    beside the ledger), or with --head, whose hash is in the site's privacy statements.

    Example: fedbags ledger verify ledger.sqlite --head 3f5a...
    """
    anchor = ledger_anchor.anchor_file(file, kit)
    problems = check.verify(file, head=_head(head), site=site, anchor=anchor)
    # A ledger that does not hold up may not be readable at all.
    losses = 0 if problems else ledger_state.LedgerState.read(file).losses
    if json_:
        found = [{"row": problem.row, "reason": problem.reason} for problem in problems]
        print_json({"intact": not problems, "losses": losses, "problems": found})
    elif problems:
        rows = terminal.table(f"{file}: NOT intact", "row", "problem")
        for problem in problems:
            rows.add_row("file" if problem.row is None else str(problem.row), problem.reason)
        terminal.console().print(rows)
    else:
        against = "" if head or anchor.path.exists() else "; without --head an older copy would not show"
        told = f"; {losses} loss(es) of rows were accepted by the site's owner" if losses else ""
        terminal.console().print(f"{file}: intact{told}{against}")
    if problems:
        raise typer.Exit(1)


@app.command("accept-version")
def accept_version(
    site_folder: Annotated[Path, typer.Argument(help="The site's folder, as it is now.")],
    ledger: _Ledger = None,
    kit: _Kit = None,
    json_: Json = False,
) -> None:
    """Accept the folder's data as a new version of the same site's data.

    Training is refused until then. What was spent on other versions keeps counting: budgets compose over
    versions, because the same patients may be in both. Only the site's owner can say that it is the same
    site, so this is done by hand, at the site, and recorded in the ledger.

    Example: fedbags ledger accept-version SITES/site-1
    """
    site, version, file = _site_and_ledger(site_folder, ledger)
    accepted = site_ledger.Ledger.accept_version(
        file, site, version, anchor=ledger_anchor.anchor_file(file, kit)
    )
    book = ledger_state.LedgerState.read(file)
    if json_:
        result = {"accepted": accepted, "data_version": version, "versions": list(book.versions)}
        print_json(result)
        return
    out = terminal.console()
    out.print(f"data version {version}", soft_wrap=True)
    out.print("accepted, and recorded in the ledger" if accepted else "known already; nothing was changed")
    out.print(
        f"epsilon {book.spent():.4g} of {book.cap.epsilon:g} is spent at delta {book.cap.delta:g} "
        f"(replace-one {events.UNIT}, PLD), over {len(book.versions)} data version(s) together"
    )


@app.command("accept-loss")
def accept_loss(
    site_folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    kit: _Kit = None,
    ledger: _Ledger = None,
    head: Annotated[
        str | None,
        typer.Option(help="Ledger head that the coordinator holds and this ledger does not, in hexadecimal."),
    ] = None,
    json_: Json = False,
) -> None:
    """Accept that the ledger, or its newest rows, are lost.

    Private training is refused until then. Put back a copy of the ledger instead, if there is one that is
    newer or as new. What the second anchor says was spent is charged on; where no anchor says it, the whole
    budget counts as spent. The loss is a row of the ledger for ever, and every statement and report shows it.

    Where ledger, anchor and journal all come from one old backup, nothing at the site tells of the loss: give
    the head that the coordinator names in its refusal.

    Example: fedbags ledger accept-loss SITES/site-1 --kit KITS/site-1
    """
    site, version, file = _site_and_ledger(site_folder, ledger)
    journal = site_file.journal_path({site_file.KIT: kit, site_file.DATA_PATH: file.parent})
    # Each line of the journal repeats the ledger's rows and hash, so it may name rows of which ledger and
    # anchor, put back from one backup, know nothing.
    seen = ledger_anchor.newest_mark(journal) if journal else ()
    lost = site_ledger.Ledger(file, version, ledger_anchor.anchor_file(file, kit), seen)
    accepted = check.accept_loss(lost, site, _head(head))
    if not accepted:
        if json_:
            print_json({"accepted": False})
        else:
            hint = (
                ""
                if head
                else "; if the coordinator refuses the site, give the head that it names with --head"
            )
            terminal.console().print(f"nothing is lost; nothing was changed{hint}")
        return
    book = ledger_state.LedgerState.read(file)
    spent = book.spent()
    # Where nobody knows what was spent, an event without noise is charged, whose epsilon is infinite. JSON
    # has no such number.
    bounded = math.isfinite(spent)
    if json_:
        result = {"accepted": True, "losses": book.losses, "spent": spent if bounded else None}
        print_json(result)
        return
    charged = (
        f"epsilon {spent:.4g} counts as spent at delta {book.cap.delta:g} (replace-one, PLD)"
        if bounded
        else "nobody knows what was spent, so the whole budget counts as spent: this site takes no part in "
        "private runs any more"
    )
    terminal.console().print(f"the loss is recorded in {file}, {book.losses} in all; {charged}")


@app.command()
def export(file: _File, json_: Json = False) -> None:
    """Print cap, events and spending, from which another accountant can recompute the epsilons.

    Noise multipliers are relative to the clip norm, a release's scale to the images its unit can move.

    Example: fedbags ledger export ledger.sqlite --json
    """
    exported = ledger_state.LedgerState.read(file).export()
    if json_:
        print_json(exported)
        return
    rows = terminal.table(f"ledger of {exported['site']}", "key", "value")
    for key, value in exported.items():
        rows.add_row(key, value if isinstance(value, str) else json.dumps(value))
    terminal.console().print(rows)


def _site_and_ledger(folder: Path, ledger: Path | None) -> tuple[str, str, Path]:
    """Return the site's name, the version of its data as they are now, and its ledger."""
    config = site_file.SiteConfig.load(folder)
    version = site_tables.data_version(folder, config, site_tables.read_listing(folder, config)[1])
    return config.name, version, ledger or folder / "ledger.sqlite"


def _head(text: str | None) -> str | None:
    """Return a ledger head as the ledger writes it.

    Raises:
        UserError: it is none.
    """
    if text is not None and (len(text) != 64 or set(text.lower()) - set("0123456789abcdef")):
        raise UserError("--head takes the 64 hexadecimal digits of a ledger head")
    # Heads are compared as texts, and the ledger writes them in lower case.
    return text and text.lower()


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|LEDGER...", help="A run folder, or the ledger.sqlite of sites."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report; made if it is missing.")],
    pdf: Annotated[
        bool, typer.Option("--pdf", help="Print the page to report.pdf too (needs Chromium).")
    ] = False,
    json_: Json = False,
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
        print_json(written)
    else:
        screen = terminal.console()
        screen.print(written["headline"], style="bold")
        worst = written["worst"]
        if worst:
            screen.print(
                f"epsilon {prose.epsilon_text(worst['epsilon'])} at delta {worst['delta']:g} "
                f"at site {worst['site']} "
                f"(unit {worst['unit']}, {worst['adjacency']}, {worst['accountant']}, upper bound)"
            )
        for problem in written["problems"]:
            where = "" if problem["row"] is None else f", row {problem['row']}"
            screen.print(f"problem: {problem['site']}{where}: {problem['reason']}", style="red")
        for name in ("html", "json", "pdf"):
            if written[name]:
                screen.print(written[name], soft_wrap=True)
    if written["problems"]:
        raise typer.Exit(1)
