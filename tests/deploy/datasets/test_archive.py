"""Hierarchical archives: both layouts become the same table, and what is wrong is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError, UserError
from deploy.datasets.build import build_sites, open_source
from deploy.datasets.options import Division, SourceOptions

NAMES = {"names1": ["warm", "cold"], "names2": ["blue", "red", "green"]}
TREE = {"tree_2to1": [1, 0, 1]}
LABELS = np.array([0, 1, 2, 1, 0, 2, 1, 1], dtype=np.uint8)
TEST = np.array([0, 0, 0, 0, 0, 0, 1, 1], dtype=np.bool_)


def arrays(**changes: Any) -> dict[str, Any]:
    """Eight images in one array; the last two are for tests. A change to None leaves an array out."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 9, 3), dtype=np.uint8)
    parents = np.array(TREE["tree_2to1"], dtype=np.uint8)
    usual = {"x": pixels, "y1": parents[LABELS], "y2": LABELS, "is_test": TEST, **NAMES, **TREE}
    return {name: array for name, array in (usual | changes).items() if array is not None}


def write(path: Path, content: dict[str, Any]) -> Path:
    np.savez_compressed(path, **content)
    return path


def in_two_parts(content: dict[str, Any]) -> dict[str, Any]:
    """The same archive in the second layout."""
    whole = dict(content)
    parts = {name: whole.pop(name) for name in ("x", "y1", "y2", "is_test")}
    test = parts.pop("is_test")
    for name, array in parts.items():
        whole |= {f"{name}_train": array[~test], f"{name}_test": array[test]}
    return whole


@pytest.mark.parametrize("parts", [1, 2])
def test_both_layouts_are_the_same_table(tmp_path: Path, parts: int) -> None:
    content = arrays()
    path = write(tmp_path / "x.npz", content if parts == 1 else in_two_parts(content))
    table = open_source(SourceOptions("archive", images=path))
    assert table.hierarchy.levels == ("level_1", "level_2")
    # Leaves keep the archive's numbers; coarse classes stand in the order of their leaves.
    assert table.hierarchy.classes == (("cold", "warm"), ("blue", "red", "green"))
    assert table.labels.tolist() == LABELS.tolist()
    assert table.columns["split"] == ["train"] * 6 + ["test"] * 2
    assert table.group_column is None
    assert np.array_equal(np.asarray(table.images.read(7)), content["x"][7])


def test_levels_and_groups_by_name(tmp_path: Path) -> None:
    ids = np.array([4, 4, 7, 7, 7, 9, 1, 1])
    table = open_source(
        SourceOptions(
            "archive", images=write(tmp_path / "x.npz", arrays(levels=["kind", "colour"], group=ids))
        )
    )
    assert table.hierarchy.levels == ("kind", "colour")
    assert table.group_column == "group"
    assert table.columns["group"][:3] == ["group 4", "group 4", "group 7"]


def test_tracks_of_the_training_part_alone(tmp_path: Path) -> None:
    """A test image is then a group of its own, and no training image's."""
    content = in_two_parts(arrays()) | {"track_train": np.array([0, 0, 0, 1, 1, 1])}
    table = open_source(SourceOptions("archive", images=write(tmp_path / "x.npz", content)))
    groups = table.columns["group"]
    assert groups[:6] == ["track 0"] * 3 + ["track 1"] * 3
    assert len(set(groups[6:])) == 2
    assert not set(groups[6:]) & set(groups[:6])


def test_labels_that_are_no_path_are_bad_rows(tmp_path: Path) -> None:
    wrong = np.array([1, 0, 1, 0, 1, 0, 0, 0], dtype=np.uint8)  # image 5 is green, and called warm
    beyond = LABELS.copy()
    beyond[2] = 9
    path = write(tmp_path / "x.npz", arrays(y1=wrong, y2=beyond))
    table = open_source(SourceOptions("archive", images=path))
    assert [row.reason for row in table.bad] == [
        "image 2: [1, 9] is no path of the tree",
        "image 5: [0, 2] is no path of the tree",
    ]
    assert len(table) == 6
    with pytest.raises(DataError, match="image 5"):
        build_sites(table, tmp_path / "out", Division(sites=1, bag_size=2, minimum_bag_size=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((8, 9, 9, 3))}, "x is float64 of shape"),
        ({"x": np.zeros((8, 9, 9, 4), np.uint8)}, "needed is \\(N, H, W\\)"),
        ({"y1": None}, "holds no y1; it has is_test"),
        ({"y2": LABELS[:3]}, "y2 is uint8 of shape \\(3,\\)"),
        ({"y2": LABELS.astype(float)}, "y2 is float64"),
        ({"is_test": np.zeros(8)}, "is_test is float64"),
        ({"tree_2to1": None}, "holds no tree_2to1"),
        ({"tree_2to1": [0, 1, 2]}, "tree_2to1 names a parent outside 0..1"),
        ({"names1": None, "names2": None}, "holds no names1"),
        ({"levels": ["one"]}, "levels is <U3"),
        ({"group": np.zeros(3, int)}, "group is int64 of shape \\(3,\\)"),
    ],
)
def test_arrays_that_are_missing_or_of_another_kind(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "x.npz", arrays(**changes))
    with pytest.raises(UserError, match=message):
        open_source(SourceOptions("archive", images=path))


def test_parts_of_different_sizes_and_files_that_are_none(tmp_path: Path) -> None:
    content = in_two_parts(arrays()) | {"x_test": np.zeros((2, 5, 5, 3), np.uint8)}
    with pytest.raises(UserError, match="different sizes"):
        open_source(SourceOptions("archive", images=write(tmp_path / "x.npz", content)))
    with pytest.raises(UserError, match="not found"):
        open_source(SourceOptions("archive", images=tmp_path / "nothing.npz"))
    (tmp_path / "y.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read as an archive of arrays: File is not a zip file"):
        open_source(SourceOptions("archive", images=tmp_path / "y.npz"))
    np.savez(tmp_path / "z.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read as an archive"):
        open_source(SourceOptions("archive", images=tmp_path / "z.npz"))


def test_groups_keep_within_sites_while_their_bags_are_drawn_at_random(tmp_path: Path) -> None:
    """`--groups sites`: 40 groups of 8 in bags of 8; with `--groups bags` each group is one bag."""
    number, labels = 320, np.tile([0, 1, 2, 1], 80).astype(np.uint8)
    parents = np.array(TREE["tree_2to1"])
    content = arrays(
        x=np.random.default_rng(1).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8),
        y1=parents[labels], y2=labels, is_test=np.zeros(number, np.bool_), group=np.arange(number) // 8,
    )  # fmt: skip
    table = open_source(SourceOptions("archive", images=write(tmp_path / "x.npz", content)))
    whole = build_sites(table, tmp_path / "whole", Division(sites=4, bag_size=8))
    mixed = build_sites(table, tmp_path / "mixed", Division(sites=4, bag_size=8, groups="sites"))
    assert whole.max_bags_per_group == 1
    assert mixed.max_bags_per_group is not None
    assert mixed.max_bags_per_group > 2
    assert "lie in several bags" in mixed.notes[0]
    manifests = [(tmp_path / "mixed" / site.name / "manifest.csv").read_text() for site in mixed.sites]
    patients = [{line.split(",")[2] for line in text.splitlines()[1:]} for text in manifests]
    assert sum(map(len, patients)) == 40, "a group is whole within its site"
    with pytest.raises(UserError, match="write bags or sites"):
        build_sites(table, tmp_path / "x", Division(groups="site"))
