"""Bags with counts and no label of any image: one site folder, complete, or every fault and nothing."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.site import SiteConfig
from common.errors import DataError, UserError
from deploy.cli.bags import app
from deploy.datasets.counts import CountedFiles, build_counted_site, read_counted_bags
from deploy.datasets.dicom import to_8_bits
from deploy.datasets.site_writer import BuildReport
from tests.deploy.datasets.test_dicom import write_dicom

Draw = Callable[[Path], None]

TREE = "kind,leaf\nwarm,Canary red\ncold,Canary green\ncold,Canary blue\n"
COUNTS = {"week 1": (2, 1, 1), "week 2": (0, 3, 2), "week 3": (1, 1, 2)}
WIDE = "bag,Canary red,Canary green,Canary blue\nweek 1,2,1,1\nweek 2,0,3,2\nweek 3,1,1,2\n"
LONG = """bag,label,count
week 1,Canary red,2
week 1,Canary green,1
week 1,Canary blue,1
week 2,Canary green,3
week 2,Canary blue,2
week 3,Canary red,1
week 3,Canary green,1
week 3,Canary blue,2
"""


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Three bags of 4, 5 and 4 images, a tree, and no counts yet."""
    for bag, counts in COUNTS.items():
        for number in range(sum(counts)):
            path = tmp_path / "bags" / bag / f"{bag[-1]}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(int(path.stem)).integers(0, 256, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (tmp_path / "hierarchy.csv").write_text(TREE)
    (tmp_path / "counts.csv").write_text(WIDE)
    return tmp_path


def build(hospital: Path, skip_bad: bool = False, fold_case: bool = False, **files: str) -> BuildReport:
    found = CountedFiles(
        hospital / "bags",
        hospital / files.get("counts", "counts.csv"),
        hospital / "hierarchy.csv",
        hospital / files["bags"] if "bags" in files else None,
    )
    bags = read_counted_bags(found, fold_case=fold_case)
    return build_counted_site(bags, hospital / "SITES", files.get("name", "site-a"), skip_bad=skip_bad)


def refusal(hospital: Path, **files: str) -> str:
    """The message of a refused build, which leaves nothing behind."""
    before = sorted(hospital.rglob("*"))
    with pytest.raises(DataError) as caught:
        build(hospital, **files)
    left = [path for path in sorted(hospital.rglob("*")) if path not in before]
    assert left in ([], [hospital / "SITES"])
    return str(caught.value)


@pytest.mark.parametrize(("layout", "table"), [("wide", WIDE), ("long", LONG)])
@pytest.mark.parametrize("listed", [False, True])
def test_counts_of_either_layout_become_a_site(hospital: Path, layout: str, table: str, listed: bool) -> None:
    (hospital / "counts.csv").write_text(table)
    rows = [f"{path.name},{path.parent.name}" for path in sorted((hospital / "bags").rglob("*.png"))]
    (hospital / "bags.csv").write_text("\n".join(["image,bag", *rows]) + "\n")
    report = build(hospital, **({"bags": "bags.csv"} if listed else {}))
    assert f"counts.csv is {layout}" in report.notes[0]
    store = BagStore.open(hospital / "SITES/site-a", 12)
    assert store.bag_ids == tuple(COUNTS)
    assert store.leaf_counts.tolist() == [list(counts) for counts in COUNTS.values()]
    for bag, name in enumerate(COUNTS):
        paths = sorted((hospital / "bags" / name).iterdir())
        for path, image in zip(paths, store[bag].images, strict=True):
            expected = Image.open(path).crop((1, 0, 13, 12))
            assert np.array_equal(image, np.asarray(expected))
    assert report.used == report.listed == 13


def test_no_label_of_an_image_is_anywhere_in_the_site(hospital: Path) -> None:
    build(hospital)
    site = hospital / "SITES/site-a"
    assert not (site / "test.csv").exists()
    assert LabelledImages.open(site, 12) is None
    for path in site.rglob("*"):
        said = path.is_file() and b"canary" in path.read_bytes().lower()
        assert not said or path.name in ("bags.csv", "hierarchy.csv"), path
        assert "canary" not in path.name.lower()
    with (site / "manifest.csv").open() as stream:
        assert next(csv.reader(stream)) == ["path", "bag_id"]
    with (site / "bags.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["bag_id"] for row in rows} == set(COUNTS), "labels stand beside bags alone"


def test_a_site_is_added_and_none_is_replaced(hospital: Path) -> None:
    other = hospital / "SITES/other/site.toml"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    build(hospital)
    assert other.read_text() == "mine"
    assert SiteConfig.load(hospital / "SITES/site-a").name == "site-a"
    with pytest.raises(UserError, match="site-a exists already"):
        build(hospital)
    assert sorted(path.name for path in (hospital / "SITES").iterdir()) == ["other", "site-a"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("week 1,2", "week 1,3", "row 2: bag 'week 1' counts 5 image(s), but 4 were found in it"),
        ("week 1,2", "week 1,-2", "row 2: Canary red '-2' is not a whole number >= 0"),
        ("week 1,2", "week 1,2.5", "row 2: Canary red '2.5' is not a whole number"),
        ("week 1,2", "week 1,two", "row 2: Canary red 'two' is not a whole number"),
        ("week 1,2", "wek 1,2", "row 2: bag 'wek 1' has counts, but no image; did you mean 'week 1'?"),
        ("week 1,2", "wek 1,2", "bag 'week 1' (4 image(s)) has no counts in counts.csv; did you mean 'wek"),
        ("week 1,2", "week 2,2", "row 3: bag 'week 2' stands already in row 2"),
        ("week 1,2", ",2", "row 2: bag is empty"),
        ("week 1,2,1,1", "week 9,2,1,1", "bag 'week 9' has counts, but no image\n"),
        ("week 1,2,1,1", "week 1,2,1", "row 2: 3 cells where the header has 4"),
        (
            "Canary red",
            "Canari red",
            "row 1: unknown label 'Canari red'; it is no leaf of the hierarchy; did",
        ),
        ("Canary red", "canary red", "did you mean 'Canary red'?"),
        ("Canary red", "cold", "row 1: label 'cold' is a class of level kind"),
        ("bag,", "bag,Total,", "cells where the header"),
    ],
)
def test_faults_of_counts_are_named(hospital: Path, old: str, new: str, expected: str) -> None:
    (hospital / "counts.csv").write_text(WIDE.replace(old, new, 1))
    assert expected in refusal(hospital)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "week 1,Canary red",
            "week 1,Canary green",
            "row 3: label 'Canary green' of bag 'week 1' is counted al",
        ),
        ("week 1,Canary red", "week 1,Canary rod", "row 2: unknown label 'Canary rod'"),
        ("week 1,Canary red,2", "week 1,Canary red,", "row 2: count '' is not a whole number"),
        ("week 1,Canary red,2", ",Canary red,2", "row 2: bag is empty"),
    ],
)
def test_faults_of_long_counts_are_named(hospital: Path, old: str, new: str, expected: str) -> None:
    (hospital / "counts.csv").write_text(LONG.replace(old, new, 1))
    assert expected in refusal(hospital)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["10.png,week 1", "10.png,week 1"], "row 3: image '10.png' stands already in row 2"),
        (
            ["10.png,week 1", "10.png,week 2"],
            "row 3: image '10.png' stands already in row 2 as one of bag 'week 1'",
        ),
        (["19.png,week 1"], "row 2: '19.png': no such image"),
        (["10.png,"], "row 2: bag is empty"),
        (["/10.png,week 1"], "row 2: '/10.png' leads out"),
    ],
)
def test_faults_of_the_table_of_bags_are_named(hospital: Path, rows: list[str], expected: str) -> None:
    (hospital / "bags.csv").write_text("\n".join(["image,bag", *rows]) + "\n")
    assert expected in refusal(hospital, bags="bags.csv")


def test_all_faults_come_together(hospital: Path, draw: Draw) -> None:
    (hospital / "bags/week 1/10.png").write_bytes(b"no image")
    (hospital / "bags/week 4").mkdir()
    draw(hospital / "bags/stray.png")
    (hospital / "counts.csv").write_text(WIDE.replace("week 2,0", "week 2,1") + "week 9,1,1,1\n")
    text = refusal(hospital)
    for part in (
        "week 1/10.png cannot be decoded",
        "bags/week 4: the bag folder holds no image",
        "stray.png: lies in no bag folder",
        "bag 'week 2' counts 6 image(s), but 5 were found",
        "bag 'week 9' has counts, but no image",
        "--skip-bad",
    ):
        assert part in text


def test_skip_bad_leaves_out_whole_bags(hospital: Path) -> None:
    (hospital / "bags/week 1/10.png").write_bytes(b"no image")
    (hospital / "counts.csv").write_text(WIDE.replace("week 2,0", "week 2,1"))
    report = build(hospital, skip_bad=True)
    store = BagStore.open(hospital / "SITES/site-a", 12)
    assert store.bag_ids == ("week 3",)
    assert (report.used, report.listed, report.quarantined) == (4, 13, 2)
    listed = (hospital / "SITES/site-a/quarantine.csv").read_text()
    assert "10.png cannot be decoded" in listed
    assert "counts 6 image(s)" in listed
    (hospital / "counts.csv").write_text(WIDE.replace(",1\n", ",9\n").replace(",2\n", ",9\n"))
    with pytest.raises(DataError, match="no bag of 'site-b' can be used"):
        build(hospital, skip_bad=True, name="site-b")


def test_a_bag_below_the_minimum_is_a_fault(hospital: Path) -> None:
    (hospital / "bags/week 1/10.png").unlink()
    (hospital / "counts.csv").write_text(WIDE.replace("week 1,2", "week 1,1"))
    assert "bag 'week 1' holds 3 image(s), the minimum is 4 (--minimum-bag-size)" in refusal(hospital)


def test_totals_blanks_and_decimals_of_spreadsheets(hospital: Path) -> None:
    table = "Bag,Canary red,Canary green,Canary blue,Total\nweek 1,2.0,1,1,4\nweek 2,,3,2,5\nweek 3,1,1,2,4\n"
    (hospital / "counts.csv").write_text(table)
    notes = build(hospital).notes
    assert any("1 blank cell(s) of counts.csv count as 0" in note for note in notes)
    (hospital / "counts.csv").write_text(table.replace(",2,5\n", ",2,6\n"))
    with pytest.raises(DataError, match="row 3: Total says 6, the classes sum to 5"):
        build(hospital, name="site-b")


def test_labels_that_differ_by_case_or_blanks_are_joined_where_asked_for(hospital: Path) -> None:
    (hospital / "counts.csv").write_text(WIDE.replace("Canary red", "CANARY\u200b  red"))
    assert "did you mean 'Canary red'?" in refusal(hospital)
    report = build(hospital, fold_case=True)
    assert any("were joined with leaves" in note for note in report.notes)
    assert BagStore.open(hospital / "SITES/site-a", 12).leaf_counts[0].tolist() == [2, 1, 1]


def test_what_is_left_out_is_counted_and_named(hospital: Path, draw: Draw) -> None:
    draw(hospital / "bags/@eaDir/week 1/10.png")
    draw(hospital / "bags/week 1/.thumbnails/10.png")
    (hospital / "bags/week 1/._10.png").write_bytes(b"\0\5\x16\7")
    (hospital / "bags/week 1/report.pdf").write_bytes(b"%PDF")
    draw(hospital / "bags/week 1/10 again.png")
    (hospital / "bags/week 1/10 again.png").write_bytes((hospital / "bags/week 2/20.png").read_bytes())
    (hospital / "counts.csv").write_text(WIDE.replace("week 1,2", "week 1,3"))
    notes = " ".join(build(hospital).notes)
    assert "@eaDir (1)" in notes
    assert ".thumbnails (1)" in notes
    assert "._* (1)" in notes
    assert ".pdf (1)" in notes
    assert "2 images are the same as another, byte for byte" in notes
    assert "1 of these 1 lie in more than one bag" in notes


def test_dicom_files_are_bags_too(hospital: Path) -> None:
    pytest.importorskip("pydicom")
    ramp = np.tile(np.arange(0, 4096, 256, dtype=np.uint16), (16, 1))
    for number in range(4):
        (hospital / f"bags/week 1/1{number}.png").unlink()
        write_dicom(hospital / f"bags/week 1/1{number}.dcm", ramp + np.uint16(number), "CANARY^1")
    assert build(hospital).used == 13
    store = BagStore.open(hospital / "SITES/site-a", 16)
    assert np.array_equal(store[0].images[0][..., 0], to_8_bits(hospital / "bags/week 1/10.dcm"))
    for path in (hospital / "SITES").rglob("*"):
        assert path.is_dir() or b"CANARY^1" not in path.read_bytes()


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["build", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_command_adds_a_site(hospital: Path) -> None:
    options: list[str | Path] = [
        "--source",
        "counts",
        "--images",
        hospital / "bags",
        "--counts",
        hospital / "counts.csv",
    ]
    options += ["--hierarchy", hospital / "hierarchy.csv", "--out", hospital / "SITES"]
    assert "13 of 13 images used" in command(*options, "--name", "one")
    command(*options, "--name", "two")
    assert len(BagStore.open(hospital / "SITES/two", 12)) == 3
    for wrong, message in (
        (["--name", "three", "--labels", "x.csv"], "--source counts does not read --labels"),
        (["--name", "three", "--sites", "2", "--bag-size", "4"], "does not read --bag-size, --sites"),
        ([], "needs --images, --counts, --hierarchy and --name"),
        (["--name", "a b"], "--name 'a b' cannot name a site"),
        (["--name", ".a"], "--name '.a'"),
        (["--name", ".."], "--name '..'"),
    ):
        with pytest.raises(UserError, match=message):
            command(*options, *wrong)
    with pytest.raises(UserError, match="--source table does not read --counts, --name"):
        command("--counts", "x", "--name", "y", "--out", "z")
