"""Tables for the terminal: one console, one look."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from common.config import RunConfig


def console(*, stderr: bool = False) -> Console:
    """The console that every command prints to."""
    return Console(stderr=stderr, highlight=False)


def table(title: str, *columns: str) -> Table:
    """An empty table; every column but the first holds figures."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        result.add_column(name, justify="left" if number == 0 else "right")
    return result


def config_rows() -> list[dict[str, Any]]:
    """Every configuration key: ``{key, default, bounds, meaning}``."""
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
            choices = " | ".join(type(value).__members__.values()) if isinstance(value, StrEnum) else ""
            yield {
                "key": key,
                "default": value,
                "bounds": bounds or choices,
                "meaning": field.description or "",
            }


def print_config(rows: list[dict[str, Any]]) -> None:
    """The keys as a table."""
    keys = Table(title="run configuration", title_justify="left", header_style="bold")
    for name in ("key", "default", "bounds", "meaning"):
        keys.add_column(name, overflow="fold")
    for row in rows:
        keys.add_row(row["key"], str(row["default"]), row["bounds"], row["meaning"])
    console().print(keys)
