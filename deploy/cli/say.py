"""Print plain text on the terminal without loading rich."""

import typer

from common.text import visible_lines


def say(text: object, *, err: bool = False) -> None:
    """Print a text with its control characters shown.

    It goes to standard output, or with ``err`` to standard error.
    """
    # Names and reasons in a text come from other sites, and could drive the terminal.
    typer.echo(visible_lines(str(text)), err=err)
