"""Class names that people write in several ways: what they have in common, and which one was meant.

``Nevus``, ``nevus`` and ``nevus`` with a blank of no width are one class to whoever wrote them. They are
never joined in silence: a source refuses them, or joins them where that was asked for.
"""

import difflib
import unicodedata
from collections.abc import Iterable


def fold(name: str) -> str:
    """Return the name without case, blanks at its ends, doubled or invisible ones, in one Unicode form."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'NAME'?"`` for the known name most like this one, or nothing."""
    choices = {fold(other): other for other in known}
    near = difflib.get_close_matches(fold(name), choices, n=1, cutoff=0.75)
    return f"; did you mean {choices[near[0]]!r}?" if near else ""
