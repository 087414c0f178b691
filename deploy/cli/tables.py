"""Print tables and texts on the terminal exactly as they are."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, get_args

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from common.config import RunConfig
from common.text import visible_lines


class _PlainConsole(Console):
    """Print texts on the terminal without taking anything in them for a command.

    No markup, emoji code or control character has an effect. Names of sites, classes, files and runs, and the
    reasons that sites give, were chosen by somebody else.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text with its control characters shown, so that a table knows how wide it is."""
        return super().render_str(visible_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable with their control characters shown.

        This includes texts that were made without render_str.
        """
        for text, style, control in super().render(renderable, options):
            # Control segments are rich's own, such as the movements of a live table.
            yield Segment(text if control else visible_lines(text), style, control)


def console(*, stderr: bool = False) -> Console:
    """Return the console that every command prints to."""
    # Without rich's own reading of a text: a class called [/x] is a name and no markup.
    return _PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def text_column(template: str) -> TextColumn:
    """Return a column of a progress bar whose text, such as ``{task.description}``, is no markup."""
    return TextColumn(template, markup=False)


def table(title: str, *columns: str) -> Table:
    """Return an empty table, in which every column but the first holds figures."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        result.add_column(name, justify="left" if number == 0 else "right")
    return result


def config_rows() -> list[dict[str, Any]]:
    """Return a row ``{key, default, bounds, meaning}`` for every configuration key."""
    return list(_rows(RunConfig(), ""))


def _rows(section: BaseModel, prefix: str) -> Iterator[dict[str, Any]]:
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{field.alias or name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{key}.")
        else:
            bounds = ", ".join(
                f"{symbol} {limit}"
                for constraint in field.metadata
                for attribute, symbol in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
                if (limit := getattr(constraint, attribute, None)) is not None
            )
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, StrEnum):
                choices = " | ".join(kind)
            else:
                choices = " | ".join(get_args(kind))
            yield {
                "key": key,
                "default": value,
                "bounds": bounds or choices,
                "meaning": field.description or "",
            }


def print_config(rows: list[dict[str, Any]]) -> None:
    """Print the keys with their defaults, bounds and meaning."""
    keys = _key_table("run configuration", "default", "bounds", "meaning")
    for row in rows:
        keys.add_row(row["key"], str(row["default"]), row["bounds"], row["meaning"])
    console().print(keys)


def print_preset(rows: list[dict[str, Any]], option: str) -> None:
    """Print the settings that an option brings with it."""
    keys = _key_table(f"what --{option} also sets, unless you do", "default", option, "why")
    for row in rows:
        keys.add_row(row["key"], str(row["default"]), str(row["preset"]), row["why"])
    console().print(keys)


def _key_table(title: str, *columns: str) -> Table:
    """Return an empty table of keys, which are never wrapped, so that they can be copied."""
    result = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    result.add_column("key", no_wrap=True)
    for name in columns:
        result.add_column(name, overflow="fold")
    return result
