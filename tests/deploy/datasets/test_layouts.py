"""The layouts of published data sets, written small in their real formats, down to site folders."""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from common.errors import DataError, UserError
from common.hierarchy import Hierarchy
from deploy.datasets.build import build_sites, open_source
from deploy.datasets.files import SourceTable
from deploy.datasets.fine_grained import _HIERARCHIES
from deploy.datasets.options import Division, SourceKind, SourceOptions, SyntheticHospitals
from tests.deploy.datasets.layouts import CARS, structs, write_aircraft, write_cars, write_cub

Draw = Callable[[Path], None]
LeafNames = Callable[[SourceTable], list[str]]


def check_build(table: SourceTable, out: Path, train: int, test: int) -> None:
    """The table becomes one site whose store has all images."""
    build_sites(table, out, Division(sites=1, bag_size=4, minimum_bag_size=2))
    assert BagStore.open(out / "site-1", 8).summary.used == train
    labelled = LabelledImages.open(out / "site-1", 8)
    assert (0 if labelled is None else len(labelled.labels)) == test


# --- nested class folders ------------------------------------------------------------------------------


def test_the_depth_of_class_folders_is_the_number_of_levels(
    tmp_path: Path, draw: Draw, leaf_names: LeafNames
) -> None:
    for name in ("a/x/1.png", "a/x/2.png", "a/y/3.jpg", "b/z/4.png", "b/5.png", "6.png"):
        draw(tmp_path / "in" / name)
    (tmp_path / "in/a/x/notes.txt").write_text("not an image")
    table = open_source(SourceOptions("folders", images=tmp_path / "in"))
    assert table.hierarchy.classes == (("a", "b"), ("x", "y", "z"))
    assert leaf_names(table) == ["x", "x", "y", "z"]
    assert sorted(row.file for row in table.bad) == ["6.png", "b/5.png"]
    with pytest.raises(DataError, match="lies 1 class folder"):
        build_sites(table, tmp_path / "out")


def test_twin_folders_keep_apart_and_split_folders_are_the_split(
    tmp_path: Path, draw: Draw, leaf_names: LeafNames
) -> None:
    for split in ("train", "val", "test"):
        for name in ("a/other/1.png", "b/other/2.png"):
            draw(tmp_path / "in" / split / name)
    table = open_source(SourceOptions("folders", images=tmp_path / "in"))
    assert set(leaf_names(table)) == {"a/other", "b/other"}
    assert table.hierarchy.classes[0] == ("a", "b")
    check_build(table, tmp_path / "out", train=4, test=2)


@pytest.mark.parametrize(
    "litter",
    [
        "train/.ipynb_checkpoints/0.png",
        "train/a/@eaDir/0.png/SYNOPHOTO_THUMB.png",
        "@eaDir/x.png",
        "__MACOSX/train/a/._0.png",
        "train/a/._0.png",
        "#recycle/a/0.png",
        ".thumbnails/0.png",
    ],
)
def test_hidden_and_system_folders_are_skipped_counted_and_named(
    tmp_path: Path, draw: Draw, litter: str
) -> None:
    for split in ("train", "test"):
        for number in range(4):
            draw(tmp_path / split / "ab"[number % 2] / f"{number}.png")
    clean = open_source(SourceOptions("folders", images=tmp_path))
    for number in range(9):
        draw(tmp_path / litter.replace("0", str(number)))
    table = open_source(SourceOptions("folders", images=tmp_path))
    assert table.hierarchy == clean.hierarchy
    assert (len(table), table.split_column, table.bad) == (8, "split", ())
    assert "Hidden and system folders and files were skipped" in table.notes[0]
    report = build_sites(table, tmp_path / "out", Division(sites=1, bag_size=4))
    assert table.notes[0] in report.notes


def test_files_of_other_endings_are_counted_and_named(tmp_path: Path, draw: Draw) -> None:
    for number in range(4):
        draw(tmp_path / "a" / f"{number}.png")
        draw(tmp_path / "b" / f"{number}.ppm")
    for name in ("a/notes.txt", "a/scan.svs", "b/scan.svs", "b/README"):
        (tmp_path / name).write_text("x")
    table = open_source(SourceOptions("folders", images=tmp_path))
    assert len(table) == 8
    assert table.hierarchy.classes == (("a", "b"),)
    assert table.notes == (
        f"4 file(s) below {tmp_path.name} do not end like an image and were left out: "
        ".svs (2), .txt (1), no ending (1).",
    )


@pytest.mark.parametrize("stray", ["cover.png", "unsorted/x.png", "unsorted/deep/x.png"])
@pytest.mark.parametrize("above", ["", "archive"])
def test_a_stray_picture_does_not_cost_the_split(
    tmp_path: Path, draw: Draw, leaf_names: LeafNames, stray: str, above: str
) -> None:
    for split in ("train", "test"):
        for number in range(4):
            draw(tmp_path / "in" / above / split / "ab"[number % 2] / f"{number}.png")
    draw(tmp_path / "in" / above / stray)
    table = open_source(SourceOptions("folders", images=tmp_path / "in"))
    assert table.columns["split"] == ["test"] * 4 + ["train"] * 4
    assert [row.file for row in table.bad] == [stray]
    with pytest.raises(DataError, match=stray):
        build_sites(table, tmp_path / "out", Division(sites=1, bag_size=4))
    report = build_sites(table, tmp_path / "out", Division(sites=1, bag_size=4), skip_bad=True)
    assert report.sites[0].test_images == 4


@pytest.mark.parametrize("word", ["test", "Train", "val"])
def test_a_folder_that_may_be_a_split_or_a_class_is_refused(tmp_path: Path, draw: Draw, word: str) -> None:
    for name in (word, "a", "b"):
        draw(tmp_path / name / "x" / "0.png")
    with pytest.raises(UserError, match=f"holds {word.lower()} beside a, b: is it a split or a class"):
        open_source(SourceOptions("folders", images=tmp_path))


def test_folders_without_images(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "in/1.png")
    with pytest.raises(UserError, match="no image in a class folder"):
        open_source(SourceOptions("folders", images=tmp_path / "in"))
    with pytest.raises(UserError, match="is missing"):
        open_source(SourceOptions("folders", images=tmp_path / "nothing"))


# --- MedMNIST ------------------------------------------------------------------------------------------


def medmnist(path: Path, channels: tuple[int, ...] = (3,), **changes: object) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for split, number in (("train", 9), ("val", 3), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (number, 10, 10, *channels), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(number) % 3).reshape(-1, 1)
    np.savez_compressed(path, **{**arrays, **changes})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("channels", [(), (3,)])
def test_medmnist_archives(tmp_path: Path, channels: tuple[int, ...], leaf_names: LeafNames) -> None:
    archive = medmnist(tmp_path / "path.npz", channels)
    table = open_source(SourceOptions("medmnist", images=archive))
    assert table.hierarchy.classes == (("class-0", "class-1", "class-2"),)
    assert table.columns["split"] == ["train"] * 9 + ["val"] * 3 + ["test"] * 4
    with np.load(archive) as arrays:
        first_test = np.asarray(table.images.read(12))
        expected = arrays["test_images"][0]
        assert np.array_equal(first_test, expected if channels else np.stack([expected] * 3, axis=-1))
    check_build(table, tmp_path / "out", train=12, test=4)


def test_medmnist_with_a_tree_and_too_few_rows_in_it(tmp_path: Path, leaf_names: LeafNames) -> None:
    (tmp_path / "tree.csv").write_text("group,cell\ng,zero\nh,one\n")
    table = open_source(
        SourceOptions("medmnist", images=medmnist(tmp_path / "x.npz"), hierarchy=tmp_path / "tree.csv")
    )
    assert leaf_names(table)[:3] == ["zero", "one", "zero"]
    assert len(table.bad) == 5
    assert "image 2: class 2 has no row" in table.bad[0].reason


def test_the_unpacked_arrays_go_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = medmnist(tmp_path / "x.npz")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    table = open_source(SourceOptions("medmnist", images=archive))
    assert len(list(scratch.iterdir())) == 1
    del table
    gc.collect()
    assert list(scratch.iterdir()) == []
    with pytest.raises(UserError):
        open_source(
            SourceOptions(
                "medmnist", images=medmnist(tmp_path / "y.npz", train_labels=np.zeros((9, 14), int))
            )
        )
    assert list(scratch.iterdir()) == [], "nor does an error leave them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.zeros((9, 14), dtype=np.int64)}, "one class number per image"),
        ({"train_labels": np.full((9, 1), -1)}, "one class number per image"),
        ({"test_images": np.zeros((4, 10, 10, 10), dtype=np.uint8)}, "test_images is uint8 of shape"),
        ({"val_images": np.zeros((3, 10, 10))}, "val_images is float64"),
    ],
)
def test_medmnist_arrays_of_another_kind(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(SourceOptions("medmnist", images=medmnist(tmp_path / "x.npz", **changes)))


def test_files_that_are_no_medmnist_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        open_source(SourceOptions("medmnist", images=tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read as a MedMNIST archive"):
        open_source(SourceOptions("medmnist", images=tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="holds no train_images"):
        open_source(SourceOptions("medmnist", images=tmp_path / "y.npz"))


# --- CUB, Aircraft, Cars -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "sizes"),
    [("cub200.csv", (13, 38, 200)), ("aircraft100.csv", (30, 70, 100)), ("cars196.csv", (9, 196))],
)
def test_the_official_trees(file: str, sizes: tuple[int, ...]) -> None:
    assert Hierarchy.from_csv(_HIERARCHIES / file).sizes == sizes


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "CUB_200_2011")


def test_cub(cub: Path, tmp_path: Path, leaf_names: LeafNames) -> None:
    table = open_source(SourceOptions("cub", images=cub))
    assert leaf_names(table)[:2] == ["Black_footed_Albatross", "Common_Yellowthroat"]
    check_build(table, tmp_path / "out", train=6, test=2)


@pytest.mark.parametrize("above", ["CUB_200_2011", "archive/CUB_200_2011"])
def test_a_folder_too_high_is_looked_into(tmp_path: Path, above: str) -> None:
    write_cub(tmp_path / "cub" / above)
    write_aircraft(tmp_path / "aircraft" / above)
    write_cars(tmp_path / "cars" / above)
    for name, number in (("cub", 8), ("aircraft", 12), ("cars", 9)):
        table = open_source(SourceOptions(name, images=tmp_path / name))
        assert (len(table), table.bad) == (number, ())


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("source", ["cub", "aircraft", "cars"])
def test_a_split_without_one_image_lists_its_rows(tmp_path: Path, source: str, skip_bad: bool) -> None:
    root = {"cub": write_cub, "aircraft": write_aircraft, "cars": write_cars}[source](tmp_path / source)
    for path in list(root.rglob("*.jpg")):
        path.unlink()
    table = open_source(SourceOptions(source, images=root))
    assert len(table) == 0
    with pytest.raises(DataError, match="no such image"):
        build_sites(table, tmp_path / "out", Division(sites=1), skip_bad=skip_bad)
    assert not (tmp_path / "out").exists()


def test_cub_rows_that_are_bad(cub: Path) -> None:
    (cub / "images/001.Black_footed_Albatross/Black_1.jpg").unlink()
    lists = (cub / "images.txt").read_text()
    (cub / "images.txt").write_text(lists + "9 ../../etc/passwd\n10 unlabelled.jpg\n")
    (cub / "image_class_labels.txt").write_text((cub / "image_class_labels.txt").read_text() + "9 1\n")
    table = open_source(SourceOptions("cub", images=cub))
    assert [str(row) for row in table.bad] == [
        "images.txt, row 1: images/001.Black_footed_Albatross/Black_1.jpg: no such image",
        "images.txt, row 9: 'passwd' leads out of the folder",
        "images.txt, row 10: unknown label ''; it is no leaf of the official tree",
    ]
    (cub / "train_test_split.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        open_source(SourceOptions("cub", images=cub))
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(UserError, match="Give the folder into which"):
        open_source(SourceOptions("cub", images=cub))


def test_a_cub_image_without_a_split_is_a_bad_row(cub: Path, tmp_path: Path) -> None:
    (cub / "train_test_split.txt").write_text("".join(f"{number} 1\n" for number in range(2, 9)))
    with pytest.raises(DataError, match=r"images.txt, row 1: split '' is neither train"):
        build_sites(open_source(SourceOptions("cub", images=cub)), tmp_path / "out", Division(sites=1))


@pytest.mark.parametrize("trainval", [True, False])
def test_aircraft(tmp_path: Path, leaf_names: LeafNames, trainval: bool) -> None:
    root = write_aircraft(tmp_path / "fgvc-aircraft-2013b", trainval=trainval)
    table = open_source(SourceOptions("aircraft", images=root))
    assert leaf_names(table)[:2] == ["Cessna 172", "707-320"]
    check_build(table, tmp_path / "out", train=8, test=4)


def test_cars_devkit(tmp_path: Path, leaf_names: LeafNames) -> None:
    root = write_cars(tmp_path / "cars")
    table = open_source(SourceOptions("cars", images=root))
    assert leaf_names(table)[:3] == CARS
    check_build(table, tmp_path / "out", train=6, test=3)

    (root / "devkit/cars_test_annos_withlabels.mat").unlink()
    plain = structs([(1, 2, 3, 4, "00001.jpg")], ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname"))
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": plain})
    with pytest.raises(UserError, match="holds no classes"):
        open_source(SourceOptions("cars", images=root))
    (root / "devkit/cars_meta.mat").write_bytes(b"not MATLAB")
    with pytest.raises(UserError, match="cannot be read as a MATLAB file"):
        open_source(SourceOptions("cars", images=root))


def test_cars_in_one_list(tmp_path: Path, draw: Draw, leaf_names: LeafNames) -> None:
    root = tmp_path / "cars"
    notes = [
        (f"car_ims/{index + 1:06d}.jpg", 1, 2, 3, 4, 1 + index % 3, int(index >= 4)) for index in range(6)
    ]
    for note in notes:
        draw(root / str(note[0]))
    names = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    content = {"annotations": structs(notes, names), "class_names": np.array([CARS], dtype=object)}
    savemat(root / "cars_annos.mat", content)
    table = open_source(SourceOptions("cars", images=root))
    assert leaf_names(table)[:3] == CARS
    check_build(table, tmp_path / "out", train=4, test=2)


def test_cars_in_class_folders(tmp_path: Path, draw: Draw, leaf_names: LeafNames) -> None:
    root = tmp_path / "cars"
    for folder in (CARS[0], "Acura_RL_Sedan_2012", "Ram CV Cargo Van Minivan 2012"):
        draw(root / "train" / folder / "1.jpg")
        draw(root / "test" / folder / "2.jpg")
    draw(root / "test/Trabant 1989/3.jpg")
    table = open_source(SourceOptions("cars", images=root))
    assert sorted(set(leaf_names(table))) == sorted(CARS)
    assert [row.reason for row in table.bad] == [
        "unknown label 'Trabant 1989'; it is no leaf of the official tree"
    ]
    with pytest.raises(UserError, match="none of the layouts"):
        open_source(SourceOptions("cars", images=root / "train"))


# --- sources by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jpeg"}, "unknown source 'jpeg'; known are: synthetic, table"),
        ({"kind": "table"}, "--source table needs --images and --labels"),
        ({"kind": "cub"}, "--source cub needs --images"),
        ({"kind": "cub", "images": Path(), "hierarchy": Path()}, "does not read --hierarchy"),
        ({"kind": "medmnist", "images": Path(), "labels": Path()}, "does not read --labels"),
        ({"kind": "synthetic", "images": Path()}, "does not read --images"),
    ],
)
def test_paths_that_are_missing_or_would_be_ignored(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(SourceOptions(**options))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_the_synthetic_source_by_name() -> None:
    table = open_source(SourceOptions(SourceKind.SYNTHETIC), SyntheticHospitals(2, 0, 40, 16, 8))
    assert len(table) == 2 * 48
