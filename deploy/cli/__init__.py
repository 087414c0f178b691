"""Define the commands of ``fedbags``, a module per group.

Here is what all of them print with, as far as it needs no rich (``deploy.cli.terminal`` does).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.text import visible_lines

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

Rounds = Annotated[int | None, typer.Option(help="Federated rounds.", min=1)]
Dp = Annotated[
    str | None,
    typer.Option(
        metavar="epsilon=E[,delta=D]", help="Train privately: budget of each site, replace-one bag."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of `fedbags config`.")
]
ConfigFile = Annotated[Path | None, typer.Option(help="Start from this config.toml.")]
Presets = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Settings of `fedbags config --preset NAME`.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
"""Options of the two commands that train, ``simulate`` and ``run``."""


def say(text: object, *, err: bool = False) -> None:
    """Print a text with its control characters shown.

    It goes to standard output, or with ``err`` to standard error.
    """
    # Names and reasons in a text come from other sites, and could drive the terminal.
    typer.echo(visible_lines(str(text)), err=err)


def print_json(value: Any) -> None:
    """Print one JSON value on standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=2))
