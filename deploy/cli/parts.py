"""List, check and add the parts that runs are made of, for ``fedbags parts``."""

from pathlib import Path
from typing import Annotated

import typer

from common.errors import require_file
from deploy.cli import Json, print_json, say
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy import part_checks
    from deploy import parts as packages
    from deploy.consortium import kits as kit_folders

app = typer.Typer(
    help="What runs are made of, explained and measured by: backbones, heads, loss terms, strategies, ...",
    no_args_is_help=True,
)


@app.command("list")
def _list(json_: Json = False) -> None:
    """List every part with the paper and licence it comes from, those of installed packages too."""
    rows = packages.rows()
    if json_:
        print_json(rows)
        return
    for row in rows:
        settings = f"  [{', '.join(row['settings'])}]" if row["settings"] else ""
        say(f"{row['kind']:<10} {row['name']:<18} {row['from']:<10} {row['source']}{settings}")


@app.command("check")
def _check(
    package: Annotated[str, typer.Argument(help="An installed package of parts.")], json_: Json = False
) -> None:
    """Check every part of a package: its arrays, its files, and whether it may train privately."""
    found = packages.read_package(package)
    lines = {part.name: part_checks.check(part) for part in found.parts}
    if json_:
        print_json({"package": found.name, "version": found.version, "parts": lines})
        return
    for line, part in zip(found.in_words(), found.parts, strict=True):
        say("\n  ".join([line, *lines[part.name]]))


@app.command("add")
def _add(
    package: Annotated[str, typer.Argument(help="An installed package of parts.")],
    kits: Annotated[Path, typer.Argument(help="The folder of a consortium's kits.")],
    password_file: Annotated[
        Path | None, typer.Option(help="File whose first line opens the authority.", exists=False)
    ] = None,
) -> None:
    """Copy the source of a package's parts into the app of a consortium.

    The app gets another hash, so every site has to approve it: `fedbags site approve --diff` shows each line.

    Example: fedbags parts add sharp-parts KITS
    """
    found = packages.read_package(package)
    password = None
    if password_file is not None:
        require_file(password_file, "the password file", "Its first line is the password.")
        password = (password_file.read_bytes().splitlines() or [b""])[0]
    for line, part in zip(found.in_words(), found.parts, strict=True):
        say("\n  ".join([line, *part_checks.check(part)]))
    changes = kit_folders.Kits.open(kits, password, with_app=False).update_app(found)
    say(f"app: {changes.app_hash}")
    say("send coordinator/app/fedbags.fab to every site: `fedbags site approve --diff` shows every line")
    names = ", ".join(f'"{part.name}"' for part in found.parts)
    say(f"each site also adds {names} to [policy] parts of its site.toml, beside what it allows already")
