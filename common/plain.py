"""Make text from other parties safe to show on a terminal or in a report.

A character that a terminal would act upon or hide is replaced by a visible escape. This module knows
nothing of where the text comes from and where it is shown.
"""

REASON_CHARACTERS = 300
"""The longest reason that is kept of a reply that was not used."""


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


def one_line(text: str, limit: int = REASON_CHARACTERS) -> str:
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
