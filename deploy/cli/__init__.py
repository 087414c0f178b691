"""Define the commands of ``fedbags``, a module per group; here is what all of them print with.

Nothing here loads rich: that is ``deploy.cli.terminal``'s.
"""

import json
from typing import Annotated, Any

import typer

from common.text import visible_lines

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def say(text: object, *, err: bool = False) -> None:
    """Print a text with its control characters shown.

    It goes to standard output, or with ``err`` to standard error.
    """
    # Names and reasons in a text come from other sites, and could drive the terminal.
    typer.echo(visible_lines(str(text)), err=err)


def print_json(value: Any) -> None:
    """Print one JSON value on standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=2))
