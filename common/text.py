"""Make text from other parties safe to show on a terminal or in a report, and log records safe to keep.

A character that a terminal would act upon or hide is replaced by a visible escape.

A log record becomes a JSON line that carries no path, patient id or label. The server's log and a site's
share this formatter. The rule stands here and not at each call: the template of a log call is a constant (a
test holds every call to that), and a value put into it is a number, a text under one of the names below, or
withheld.
"""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

_REASON_CHARACTERS = 300
"""The longest reason that is kept of a reply that was not used."""

_SPOKEN = frozenset({"code", "error", "file", "phase", "reason", "site", "sites", "state"})
"""The names under which a text may be logged: ``log.info("%(site)s came back", {"site": name})``. Each
holds the name of a site, a word of ours, or the bare name of a file of ours."""
_WITHHELD = "[withheld]"
_PATH = "[path]"
_PACKAGES = ("common", "server", "client", "deploy")
_PATH_PATTERN = re.compile(r"\S*[/\\]\S*")


def visible(text: str, *, keep: str = "") -> str:
    r"""Return the text with every character that is not printable written as its escape, such as ``\x1b``.

    Control characters, line ends, marks that turn the direction of writing, invisible characters and halves
    of surrogate pairs are not printable; letters of any script are.

    Args:
        text: any text.
        keep: characters that stay as they are, such as a line end.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def visible_lines(text: str) -> str:
    """Return the text as ``visible`` does, with its line ends and tabs kept."""
    return visible(text, keep="\n\t")


def one_line(text: str, limit: int = _REASON_CHARACTERS) -> str:
    """Return the text on one visible line, cut to ``limit`` characters with an ellipsis.

    Args:
        text: any text, of any length.
        limit: at least 1.
    """
    # Cut before escaping: the text may be megabytes from a hostile site, and an escape is longer than the
    # character that it stands for.
    start = visible(text[: limit + 1])
    return start if len(start) <= limit else start[: limit - 1] + "…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class JsonLines(logging.Formatter):
    """Format a log record as one JSON object.

    It holds the time (UTC), level, logger, message, and each named value by itself.

    An exception appears as its class and the place in our own code where it was raised; its text, which
    can carry a path or a patient id, does not.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line of a record, without its line end."""
        message, named = _fill(record)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **named,
        }
        # Only the class and place of an exception are written: its text can hold a file name or a cell of a
        # table.
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            line |= {"exception": kind.__name__, "at": _place(trace)}
        return json.dumps(line)


def _fill(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """Return the message with its permitted values put in, and the named values."""
    if not isinstance(record.msg, str):
        return type(record.msg).__name__, {}
    named: dict[str, Any] = {}
    values: Any
    if isinstance(record.args, Mapping):
        named = {name: _named(name, value) for name, value in record.args.items()}
        values = named
    else:
        values = tuple(_number(value) for value in record.args or ())
    try:
        return (record.msg % values if values else record.msg), named
    except (TypeError, ValueError, KeyError):  # a text was withheld where a number was to be written
        return record.msg, named


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else _WITHHELD


def _named(name: str, value: Any) -> Any:
    # A text under a permitted name, such as a reason, may still have a path inside it.
    if name in _SPOKEN and isinstance(value, str):
        return _PATH_PATTERN.sub(_PATH, value)
    if name in _SPOKEN and isinstance(value, list | tuple):
        return [_named(name, part) for part in value]
    return _number(value)


def _place(trace: TracebackType | None) -> str:
    """Return ``module:line`` of the innermost frame of our own code, or an empty text."""
    place = ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _PACKAGES:
            place = f"{module}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
