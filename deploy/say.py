"""Lines for the terminal, in a module that loads no rich: the one way by which plain text is printed."""

import typer

from common.plain import visible_lines


def say(text: object, *, err: bool = False) -> None:
    """Print a text, its control characters shown, on standard output, or on standard error with ``err``."""
    typer.echo(visible_lines(str(text)), err=err)
