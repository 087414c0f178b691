"""Represent the label tree with its levels, the classes of each level, and their parents.

Counts roll up from leaves to coarser levels exactly (integers); predictions are decoded to the best
root-to-leaf path. This module knows nothing of images, models or sites.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import BadRow, DataError
from common.files import TableError, read_rows, write_csv

if TYPE_CHECKING:  # the tree is read where no model is
    from torch import Tensor


_LONGEST_LABEL = 200
"""Characters of the name of a class or level."""


def _is_label(name: str) -> bool:
    """Return True if a text can name a class or level.

    Such a name is not empty, not longer than ``_LONGEST_LABEL``, and free of control characters.
    """
    # Unicode category C holds control, format and surrogate characters, which could deceive a terminal or
    # reverse the direction of writing.
    return 0 < len(name) <= _LONGEST_LABEL and not any(unicodedata.category(c)[0] == "C" for c in name)


@dataclass(frozen=True)
class Hierarchy:
    """Represent a label tree of L >= 1 levels with all leaves at the same depth.

    Attributes:
        levels: the name of each level, coarse to fine.
        classes: the class names of each level; their order defines the class indices.
        parents: ``parents[l][c]`` is the index at level ``l - 1`` of class ``c`` of level ``l``;
            ``parents[0]`` is empty.
    """

    levels: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]

    @classmethod
    def from_rows(
        cls,
        levels: Sequence[str],
        rows: Sequence[Sequence[str]],
        file: str = "hierarchy",
        lines: Sequence[int] | None = None,
    ) -> Self:
        """Build the tree from one row per leaf, coarse to fine.

        Args:
            levels: level names, coarse to fine.
            rows: one row per leaf, one cell per level; the classes keep their order of appearance.
            file: the name that error rows carry.
            lines: the line of the file that each row stands on; by default a header and no blank lines.

        Raises:
            DataError: ragged rows, empty cells, a leaf given twice, or a class under two parents;
                every bad row is listed.
        """
        bad: list[BadRow] = []
        if not levels or not all(map(_is_label, levels)) or len(set(levels)) != len(levels):
            raise DataError(
                f"{file}: the header must name each level once, coarse to fine; got {list(levels)}"
            )
        # Every fault is collected before any is raised, so that one pass lists all rows to mend.
        index: list[dict[str, int]] = [{} for _ in levels]
        parents: list[list[int]] = [[] for _ in levels]
        first_seen: dict[tuple[int, str], int] = {}
        for number, row in zip(lines or range(2, len(rows) + 2), rows, strict=True):
            cells = [cell.strip() for cell in row]
            if len(cells) != len(levels) or not all(cells):
                bad.append(BadRow(file, number, f"{len(levels)} non-empty cells expected: {cells}"))
                continue
            if odd := [cell for cell in cells if not _is_label(cell)]:
                reason = f"a name of more than {_LONGEST_LABEL} characters, or with a control character: "
                bad.append(BadRow(file, number, reason + ascii(odd[0][:40])))
                continue
            conflict = ""
            for level in range(1, len(levels)):
                known = index[level].get(cells[level])
                if known is None:
                    continue
                expected = index[level - 1].get(cells[level - 1])
                if parents[level][known] != expected:
                    line = first_seen[level, cells[level]]
                    conflict = f"{levels[level]} {cells[level]!r} has another parent than in row {line}"
            if not conflict and cells[-1] in index[-1]:
                conflict = f"leaf {cells[-1]!r} stands already in row " + str(
                    first_seen[len(levels) - 1, cells[-1]]
                )
            if conflict:
                bad.append(BadRow(file, number, conflict))
                continue
            for level, name in enumerate(cells):
                if name not in index[level]:
                    index[level][name] = len(index[level])
                    first_seen[level, name] = number
                    if level:
                        parents[level].append(index[level - 1][cells[level - 1]])
        if bad or not index[-1]:
            raise DataError(
                f"{file} is not a tree whose leaves are all at level {levels[-1]!r}"
                if bad
                else f"{file} holds no leaf",
                bad,
                "Write one row per leaf, with every level filled in and one parent per class.",
            )
        return cls(
            levels=tuple(levels),
            classes=tuple(tuple(names) for names in index),
            parents=tuple(tuple(level) for level in parents),
        )

    @classmethod
    def from_csv(cls, path: Path) -> Self:
        """Read the tree from a ``hierarchy.csv``.

        The file has a header of level names, then one row per leaf (see ``from_rows``).

        Raises:
            DataError: the file cannot be read, is empty, or holds no tree.
        """
        try:
            numbered = list(read_rows(path.read_bytes()))
        except (OSError, TableError) as error:
            row = f"row {error.line} " if isinstance(error, TableError) and error.line else ""
            raise DataError(
                f"the hierarchy {path} cannot be read: {row}{error}",
                advice="Give a UTF-8 CSV: a header of level names, then one row per leaf.",
            ) from error
        if not numbered:
            raise DataError(f"the hierarchy {path} is empty")
        lines, rows = zip(*numbered, strict=True)
        return cls.from_rows([name.strip() for name in rows[0]], rows[1:], str(path), lines[1:])

    def to_rows(self) -> list[list[str]]:
        """Return one row per leaf, coarse to fine, as ``from_rows`` takes them."""
        return [
            [self.classes[level][node] for level, node in enumerate(path)] for path in self.paths.tolist()
        ]

    def to_csv(self, path: Path) -> None:
        """Write the tree as a CSV file that ``from_csv`` reads."""
        write_csv(path, self.levels, self.to_rows())

    def to_dict(self) -> dict[str, Any]:
        """Return the tree in a form that JSON can hold.

        The keys are ``levels``, a list of names, and ``rows``, a list with one list of names per leaf.
        """
        return {"levels": list(self.levels), "rows": self.to_rows()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the tree from the form that ``to_dict`` returns."""
        return cls.from_rows(data["levels"], data["rows"])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of classes of each level."""
        return tuple(len(names) for names in self.classes)

    @cached_property
    def paths(self) -> NDArray[np.int64]:
        """Return the class index of each leaf at every level, shape (C_L, L)."""
        columns = [np.arange(self.sizes[-1])]
        for level in range(len(self.levels) - 1, 0, -1):
            columns.append(np.asarray(self.parents[level], dtype=np.int64)[columns[-1]])
        return np.stack(columns[::-1], axis=1).astype(np.int64)

    @cached_property
    def leaf_index(self) -> dict[str, int]:
        """Return the index of each leaf by its name."""
        return {name: leaf for leaf, name in enumerate(self.classes[-1])}

    def roll_up(self, leaf_counts: NDArray[Any]) -> list[NDArray[Any]]:
        """Sum leaf counts up the tree.

        Args:
            leaf_counts: shape (..., C_L), any numeric dtype (integers stay exact).

        Returns:
            One array of shape (..., C_l) per level, coarse to fine; the last equals the input.
        """
        rolled = []
        for level, size in enumerate(self.sizes):
            out = np.zeros((*leaf_counts.shape[:-1], size), dtype=leaf_counts.dtype)
            for leaf, node in enumerate(self.paths[:, level]):
                out[..., node] += leaf_counts[..., leaf]
            rolled.append(out)
        return rolled

    def decode(self, log_probabilities: "Sequence[Tensor]") -> "Tensor":
        """Return the best root-to-leaf path of each image.

        It is the path whose log-probabilities, summed over the levels, are largest.

        Args:
            log_probabilities: per level a tensor of shape (N, C_l).

        Returns:
            Shape (N, L), int64: consistent class indices, coarse to fine.
        """
        import torch

        paths = torch.as_tensor(self.paths, device=log_probabilities[0].device)
        score = sum(
            level_scores.float()[:, paths[:, level]] for level, level_scores in enumerate(log_probabilities)
        )
        assert isinstance(score, torch.Tensor)
        return paths[score.argmax(dim=1)]
