"""Text that somebody else chose, made safe to show: what a terminal would act upon, or hide, becomes visible.

Knows nothing of where the text comes from and where it is shown.
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
    """Return the text as visible() does, its line ends and tabs kept."""
    return visible(text, keep="\n\t")


def one_line(text: str, limit: int = REASON_CHARACTERS) -> str:
    """Return the text on one visible line of at most ``limit`` characters, its end cut off with an ellipsis.

    Args:
        text: any text, of any length.
        limit: at least 1.
    """
    start = visible(text[: limit + 1])
    return start if len(start) <= limit else start[: limit - 1] + "…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
