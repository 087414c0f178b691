"""Read the methods: each is a preset that names the parts of the model and the terms of the loss.

A method is a file of ``common/presets/methods``. It says what a key of the table ``model`` means that a
configuration leaves empty. Whoever builds a model or its loss reads the files, and ``fedbags config``.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "presets" / "methods"
DEFAULT = "lhfglp"
_BOUND = "labels"
"""The term of methods that learn from labels."""
NO_BLOCK = "none"
DICTIONARY = "dictionary"
"""The block that ``model.dictionary`` switches."""


@dataclass(frozen=True)
class Recipe:
    """Name the parts of a model and the terms of its loss."""

    block: str
    """Between backbone and heads, or ``none``."""
    head: str
    levels: str
    """``each``: a head at every level; ``leaf``: one at the leaf, its probabilities summed up the tree."""
    tied: bool
    """One distribution over the tree's paths."""
    terms: tuple[str, ...]
    """Of the loss, in the order in which they are added up."""

    @property
    def leaf_only(self) -> bool:
        """Return True if the only head is at the leaf."""
        return self.levels == "leaf"

    @property
    def sees_labels(self) -> bool:
        """Return True if it learns from labels, as bags of one image: a bound for comparisons."""
        return _BOUND in self.terms

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of all parts."""
        return (*([self.block] if self.block != NO_BLOCK else []), self.head, *self.terms)


def method_names() -> list[str]:
    """Return the name of every method, LHFGLP first."""
    names = sorted(path.stem for path in _FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: name != DEFAULT)


def method_file(name: str) -> Path:
    """Return the file of a method, which need not exist."""
    return _FOLDER / f"{name}.toml"


@cache
def recipe(method: str) -> Recipe:
    """Return what a method consists of.

    Args:
        method: one of ``method_names``.
    """
    table = tomllib.loads(method_file(method).read_text(encoding="utf-8"))["model"]
    return Recipe(
        block=table["block"],
        head=table["head"],
        levels=table["levels"],
        tied=table["tied"],
        terms=tuple(table["terms"].split(",")),
    )


def sees_labels(method: str) -> bool:
    """Return True if a method learns from labels, as bags of one image: a bound for comparisons."""
    return recipe(method).sees_labels
