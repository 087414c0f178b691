"""The label tree: reading, refusing, rolling up, decoding."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.hierarchy import Hierarchy

# Names as users write them: commas, quotes, spaces inside, any script. A cell is stripped on reading.
names = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=8).map(str.strip).filter(bool)


@st.composite
def hierarchies(draw: st.DrawFn, max_levels: int = 4, max_leaves: int = 12) -> Hierarchy:
    """Any tree whose leaves share one depth; classes in order of appearance, levels named apart."""
    depth = draw(st.integers(1, max_levels))
    leaves = draw(st.integers(1, max_leaves))
    groups = [list(range(leaves))]
    for _ in range(depth - 1):
        # Merge neighbouring classes of the level below: a partition into runs.
        below = max(groups[-1]) + 1
        cuts = draw(st.lists(st.booleans(), min_size=below - 1, max_size=below - 1))
        of_class = np.cumsum([0, *cuts]).tolist()
        groups.append([of_class[c] for c in groups[-1]])
    rows = list(zip(*[[f"{level}/{c}" for c in column] for level, column in enumerate(groups)], strict=True))
    levels = [f"level_{n}" for n in range(1, depth + 1)]
    order = draw(st.permutations(range(leaves)))
    return Hierarchy.from_rows(levels, [rows[leaf][::-1] for leaf in order])


@given(hierarchies(), st.integers(0, 2**31), st.data())
def test_counts_roll_up_exactly(hierarchy: Hierarchy, largest: int, data: st.DataObject) -> None:
    leaf_counts = np.array(
        [
            data.draw(
                st.lists(st.integers(0, largest), min_size=hierarchy.sizes[-1], max_size=hierarchy.sizes[-1])
            )
        ]
    )
    rolled = hierarchy.roll_up(leaf_counts)
    assert [counts.dtype for counts in rolled] == [np.int64] * len(hierarchy.levels)
    np.testing.assert_array_equal(rolled[-1], leaf_counts)
    for level in range(1, len(hierarchy.levels)):
        for parent in range(hierarchy.sizes[level - 1]):
            children = [c for c, p in enumerate(hierarchy.parents[level]) if p == parent]
            assert rolled[level - 1][0, parent] == sum(int(rolled[level][0, c]) for c in children)


def test_roll_up_takes_one_bag_many_bags_and_fractions(tree: Hierarchy) -> None:
    assert [counts.tolist() for counts in tree.roll_up(np.array([1, 2, 3, 4]))] == [
        [6, 4],
        [3, 3, 4],
        [1, 2, 3, 4],
    ]
    many = tree.roll_up(np.ones((5, 2, 4), dtype=np.int32))
    assert [counts.shape for counts in many] == [(5, 2, 2), (5, 2, 3), (5, 2, 4)]
    np.testing.assert_allclose(tree.roll_up(np.full(4, 0.25))[0], [0.75, 0.25])


@example(levels=["0;1"], leaves=["0;0"])
@example(levels=[";"], leaves=["0"])
@example(levels=["sep=x"], leaves=["a", "b"])
@example(levels=["a|b", "c;d"], leaves=["x"])
@given(
    st.lists(names, min_size=1, max_size=4, unique=True), st.lists(names, min_size=1, max_size=6, unique=True)
)
@settings(max_examples=50)
def test_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, levels: list[str], leaves: list[str]
) -> None:
    hierarchy = Hierarchy.from_rows(levels, [[*["all"] * (len(levels) - 1), leaf] for leaf in leaves])
    path = tmp_path_factory.mktemp("tree") / "hierarchy.csv"
    hierarchy.to_csv(path)
    assert Hierarchy.from_csv(path) == hierarchy
    assert Hierarchy.from_dict(hierarchy.to_dict()) == hierarchy


@given(hierarchies())
@settings(max_examples=50)
def test_rows_round_trip(hierarchy: Hierarchy) -> None:
    again = Hierarchy.from_rows(hierarchy.levels, hierarchy.to_rows())
    # Written back leaf by leaf, classes keep their order of appearance, so nothing is renumbered.
    assert again == hierarchy
    assert hierarchy.paths.shape == (hierarchy.sizes[-1], len(hierarchy.levels))


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ("a,b\nx,1\ny\n", 3, "2 non-empty cells"),
        ("a,b\nx,1\ny,2,3\n", 3, "2 non-empty cells"),
        ("a,b\nx,1\n,2\n", 3, "2 non-empty cells"),
        ("a,b\nx,1\nx,2\nx,1\n", 4, "stands already in row 2"),
        ("a,b,c\nx,m,1\ny,m,2\n", 3, "another parent than in row 2"),
        ("a,b\nx,1\ny,1\n", 3, "another parent than in row 2"),
        ("a,b\nx,1\n\n\ny\n", 5, "2 non-empty cells"),
        ("a,b\nx,1\ny,2\x1b[2J\n", 3, "control character"),
        ("a,b\nx,1\ny,2\u202e\n", 3, "control character"),
        ('a,b\nx,1\n"y\ny",2\n', 4, "control character"),
        (f"a,b\nx,1\ny,{'2' * 201}\n", 3, "more than 200 characters"),
    ],
)
def test_ragged_or_inconsistent_trees_are_refused_with_the_row(
    tmp_path: Path, text: str, row: int, reason: str
) -> None:
    path = tmp_path / "hierarchy.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as caught:
        Hierarchy.from_csv(path)
    assert [bad.row for bad in caught.value.rows] == [row]
    assert str(path) in str(caught.value)


def test_every_bad_row_is_listed() -> None:
    with pytest.raises(DataError) as caught:
        Hierarchy.from_rows(["a", "b"], [["x", "1"], ["y"], ["y", "1"], ["z", ""]])
    assert [bad.row for bad in caught.value.rows] == [3, 4, 5]


def test_a_refused_row_leaves_no_class_behind() -> None:
    """The row that makes 'm' inconsistent must not be what later rows are compared with."""
    rows = [["x", "m", "1"], ["y", "m", "2"], ["x", "m", "3"]]
    with pytest.raises(DataError) as caught:
        Hierarchy.from_rows(["a", "b", "c"], rows)
    assert [bad.row for bad in caught.value.rows] == [3]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"a,b\n", b"a,a\nx,1\n", b"a,\nx,1\n", b"a,b\n\xff\xfe,1\n"],
    ids=["empty", "blank", "no leaf", "level twice", "unnamed level", "not UTF-8"],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hierarchy.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"hierarchy\.csv"):
        Hierarchy.from_csv(path)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Hierarchy.from_csv(tmp_path / "hierarchy.csv")


def test_byte_order_mark_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "hierarchy.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n x , 1\r\n\r\nx,2\r\n")
    assert Hierarchy.from_csv(path) == Hierarchy(("a", "b"), (("x",), ("1", "2")), ((), (0, 0)))


@given(hierarchies(), st.integers(0, 2**16))
@settings(max_examples=50)
def test_decoder_finds_the_best_consistent_path(hierarchy: Hierarchy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(3, size, generator=generator).log_softmax(1) for size in hierarchy.sizes]
    decoded = hierarchy.decode(scores)
    combinations = list(_consistent_paths(hierarchy))
    for image in range(3):
        values = [
            sum(float(scores[level][image, c]) for level, c in enumerate(path)) for path in combinations
        ]
        assert tuple(decoded[image].tolist()) == combinations[int(np.argmax(values))]


def _consistent_paths(hierarchy: Hierarchy) -> Iterator[tuple[int, ...]]:
    """Every consistent path, by brute force over all combinations of classes."""
    for path in product(*map(range, hierarchy.sizes)):
        if all(hierarchy.parents[level][path[level]] == path[level - 1] for level in range(1, len(path))):
            yield path
