"""Building site folders: complete, deterministic, without instance labels, all or nothing."""

import csv
import errno
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deploy.datasets.build
from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.site import SiteConfig
from common.errors import BadRow, DataError, UserError
from common.hierarchy import Hierarchy
from deploy.datasets.build import build_sites
from deploy.datasets.files import ArrayImages, FileImages, SourceTable
from deploy.datasets.options import Division

TREE = Hierarchy.from_rows(
    ("kind", "leaf"), [("dark", "canary-a"), ("dark", "canary-b"), ("light", "canary-c")]
)


def array_source(images: int = 120, **columns: list[str]) -> SourceTable:
    """Images whose three leaves are three grey levels; every image is unique."""
    labels = np.arange(images) % 3
    pixels = np.repeat((labels * 80).astype(np.uint8)[:, None], 12 * 12 * 3, axis=1)
    pixels = pixels.reshape(images, 12, 12, 3)
    pixels[:, 0, 0, 0] = np.arange(images) % 256
    pixels[:, 0, 1, 0] = np.arange(images) // 256
    return SourceTable(
        file="metadata.csv",
        images=ArrayImages(lambda index: pixels[index]),
        labels=labels.astype(np.int64),
        hierarchy=TREE,
        lines=list(range(2, images + 2)),
        columns=columns,
    )


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def source_index(image: np.ndarray) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[0, 1, 0])


@pytest.fixture
def split() -> list[str]:
    return ["test" if index % 5 == 0 else "train" for index in range(120)]


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "column:clinic"])
@pytest.mark.parametrize("bags", ["random", "column:week", "similarity"])
def test_every_training_image_lands_in_one_bag_with_true_counts(
    tmp_path: Path, split: list[str], partition: str, bags: str
) -> None:
    source = array_source(
        split=split,
        clinic=[f"Clinic {index % 2}" for index in range(120)],
        week=[str(index // 20) for index in range(120)],
    )
    number = None if partition.startswith("column") else 2
    report = build_sites(
        source,
        tmp_path / "out",
        Division(sites=number, bag_size=8, partition=partition, bags=bags, split_column="split"),
    )
    trained, tested = [], []
    for site in report.sites:
        store = BagStore.open(tmp_path / "out" / site.name, 12)
        for index in range(len(store)):
            bag = store[index]
            members = [source_index(image) for image in bag.images]
            assert np.bincount(source.labels[members], minlength=3).tolist() == bag.counts.tolist()
            trained += members
        test = LabelledImages.open(tmp_path / "out" / site.name, 12)
        assert test is not None
        members = [source_index(image) for image in test.images]
        assert source.labels[members].tolist() == test.labels.tolist()
        tested += members
        sizes = store.bag_sizes
        assert (site.bag_size_min, site.bag_size_max) == (sizes.min(), sizes.max())
        assert (site.bags, site.images, site.test_images) == (len(store), sizes.sum(), len(test.labels))
    assert sorted(trained) == [index for index in range(120) if split[index] == "train"]
    assert sorted(tested) == [index for index in range(120) if split[index] == "test"]
    assert report.used == report.listed == 120
    names = ["Clinic-0", "Clinic-1"] if number is None else ["site-1", "site-2"]
    assert [site.name for site in report.sites] == names


def test_the_seed_fixes_every_byte(tmp_path: Path, split: list[str]) -> None:
    source = array_source(split=split)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_sites(source, tmp_path / name, Division(sites=2, bag_size=8, split_column="split", seed=seed))
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert tree_bytes(tmp_path / "a") != tree_bytes(tmp_path / "c")


def test_no_instance_label_original_name_or_group_is_written(
    tmp_path: Path, noise: Callable[[Path, int], None]
) -> None:
    paths = [tmp_path / "in" / f"canary-{'abc'[index % 3]}-{index}.png" for index in range(60)]
    for index, path in enumerate(paths):
        noise(path, index)
    source = replace(
        array_source(60, patient=[f"secret-patient-{index // 2}" for index in range(60)]),
        images=FileImages(paths),
    )
    build_sites(source, tmp_path / "out", Division(sites=1, bag_size=10, group_column="patient"))
    site = tmp_path / "out/site-1"
    assert not (site / "test.csv").exists()
    for name, content in tree_bytes(site).items():
        assert re.fullmatch(r"images/\d{6}\.png|\w+\.(csv|toml)", name)
        assert b"secret" not in content
        if name not in ("bags.csv", "hierarchy.csv"):
            assert b"canary" not in content
    rows = list(csv.DictReader((site / "manifest.csv").read_text().splitlines()))
    assert all(re.fullmatch(r"p\d{4}", row["patient_id"]) for row in rows)
    # Neither the number of a file nor its place in the manifest tells the label.
    by_pixels = {path.read_bytes(): index % 3 for index, path in enumerate(paths)}
    labels = np.array([by_pixels[(site / row["path"]).read_bytes()] for row in rows])
    numbers = np.array([int(Path(row["path"]).stem) for row in rows])
    assert abs(np.corrcoef(labels, numbers)[0, 1]) < 0.4
    assert (np.diff(labels) != 0).sum() > 20


def test_files_keep_their_bytes_but_not_their_time(
    tmp_path: Path, noise: Callable[[Path, int], None]
) -> None:
    paths = [tmp_path / "in" / f"{index}.png" for index in range(9)]
    for index, path in enumerate(paths):
        noise(path, index)
    Image.new("RGB", (12, 12)).save(tmp_path / "in/8.bmp")
    paths[8] = tmp_path / "in/8.bmp"
    source = replace(array_source(9), images=FileImages(paths))
    build_sites(source, tmp_path / "out", Division(sites=1, bag_size=4))
    written = list((tmp_path / "out/site-1/images").iterdir())
    assert {path.suffix for path in written} == {".png"}, "what is neither PNG nor JPEG becomes PNG"
    contents = {path.read_bytes() for path in written}
    assert all(path.read_bytes() in contents for path in paths[:8])
    assert all(time.time() - path.stat().st_mtime < 60 for path in written)


def test_a_group_lies_in_one_bag_and_the_report_says_so(tmp_path: Path) -> None:
    sizes = [1, 2, 3, 30, 5, 7, 1, 1, 12, 9, 4, 20]
    patients = [str(patient) for patient, size in enumerate(sizes) for _ in range(size)]
    source = array_source(len(patients), patient=patients)
    report = build_sites(source, tmp_path / "out", Division(sites=2, bag_size=8, group_column="patient"))
    assert report.max_bags_per_group == 1
    assert "Each of the 12 groups lies in one bag" in report.notes[0]
    seen: dict[str, set[tuple[str, str]]] = {}
    for site in report.sites:
        store = BagStore.open(tmp_path / "out" / site.name, 12)
        for index in range(len(store)):
            for image in store[index].images:
                patient = patients[source_index(image)]
                seen.setdefault(patient, set()).add((site.name, store[index].bag_id))
    assert all(len(bags) == 1 for bags in seen.values())
    assert max(site.bag_size_max for site in report.sites) >= 30


def test_a_group_that_a_column_divides_is_reported(tmp_path: Path) -> None:
    source = array_source(
        60,
        patient=[str(index // 6) for index in range(60)],
        clinic=["x" if index < 33 else "y" for index in range(60)],
        split=["test" if index == 0 else "train" for index in range(60)],
    )
    report = build_sites(
        source,
        tmp_path / "out",
        Division(bag_size=6, partition="column:clinic", group_column="patient", split_column="split"),
    )
    assert report.max_bags_per_group == 2
    assert "1 of 10 groups lie in several bags (at most 2)" in report.notes[0]
    assert "1 group(s) have images on both sides of the split" in report.notes[1]


def test_without_groups_the_report_warns_about_the_unit(tmp_path: Path) -> None:
    report = build_sites(array_source(), tmp_path / "out", Division(bag_size=8))
    assert report.max_bags_per_group is None
    assert "not one per patient" in report.notes[0]
    assert report.to_dict()["sites"][0]["name"] == "site-1"
    assert len(report.sites) == 5


def test_the_minimum_bag_size_goes_into_the_policy(tmp_path: Path) -> None:
    build_sites(array_source(), tmp_path / "out", Division(sites=1, bag_size=16, minimum_bag_size=9))
    assert SiteConfig.load(tmp_path / "out/site-1").policy.minimum_bag_size == 9
    assert BagStore.open(tmp_path / "out/site-1", 12).bag_sizes.sum() == 120
    assert sorted(BagStore.open(tmp_path / "out/site-1", 12).bag_sizes)[-2:] == [16, 24]


def test_bags_by_similarity_are_purer_than_random_ones(tmp_path: Path) -> None:
    purity = {}
    for bags in ("random", "similarity"):
        build_sites(array_source(), tmp_path / bags, Division(sites=1, bag_size=8, bags=bags))
        store = BagStore.open(tmp_path / bags / "site-1", 12)
        purity[bags] = (store.leaf_counts.max(axis=1) / store.bag_sizes).mean()
    assert purity["similarity"] > 0.95 > purity["random"]


def test_bad_rows_are_listed_together_or_quarantined(
    tmp_path: Path, noise: Callable[[Path, int], None], split: list[str]
) -> None:
    paths = [tmp_path / "in" / f"{index}.png" for index in range(120)]
    for index, path in enumerate(paths):
        noise(path, index)
    paths[5].write_bytes(paths[5].read_bytes()[:40])
    split[7] = "holdout"
    source = replace(
        array_source(split=split),
        images=FileImages(paths),
        bad=(BadRow("metadata.csv", 900, "unknown label 'x'"),),
    )
    with pytest.raises(DataError) as caught:
        build_sites(source, tmp_path / "out", Division(bag_size=8, sites=2, split_column="split"))
    text = str(caught.value)
    assert "metadata.csv holds 3 bad row(s)" in text
    assert "row 7: " in text
    assert "5.png cannot be decoded" in text
    assert "row 9: split 'holdout' is neither train, val nor test" in text
    assert "row 900: unknown label 'x'" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    report = build_sites(
        source, tmp_path / "out", Division(bag_size=8, sites=2, split_column="split"), skip_bad=True
    )
    assert (report.listed, report.used, report.quarantined) == (121, 118, 3)
    assert len((tmp_path / "out/quarantine.csv").read_text().splitlines()) == 4
    for site in report.sites:
        BagStore.open(tmp_path / "out" / site.name, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bag_size": 3}, "at least the minimum bag size"),
        ({"partition": "even"}, "--partition 'even': write iid"),
        ({"partition": "dirichlet:0"}, "ALPHA must be a number above 0"),
        ({"partition": "dirichlet:nan"}, "ALPHA must be a number above 0"),
        ({"partition": "dirichlet:x"}, "ALPHA must be a number above 0"),
        ({"partition": "column:ward"}, "no column 'ward'; its columns are: clinic"),
        ({"partition": "column:clinic", "sites": 3}, "column 'clinic' has 2 values"),
        ({"bags": "pure"}, "--bags 'pure': write random"),
        ({"bags": "column:ward"}, "no column 'ward'"),
        ({"group_column": "patient"}, "no column 'patient'"),
        ({"split_column": "split"}, "no column 'split'"),
        ({"sites": 0}, "at least one site"),
        ({"sites": 60}, "too few for one bag"),
    ],
)
def test_a_wrong_option_is_explained_and_nothing_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    source = array_source(clinic=["x", "y"] * 60)
    with pytest.raises(UserError) as caught:
        build_sites(source, tmp_path / "out", Division(**options))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_a_source_without_training_images(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        build_sites(array_source(), tmp_path / "out")
    with pytest.raises(UserError, match="no usable training image"):
        build_sites(array_source(split=["test"] * 120), tmp_path / "new", Division(split_column="split"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"disk is full: .* needs about 51,840 bytes"),
        (errno.EACCES, "cannot be written: Permission denied"),
    ],
)
def test_a_disk_that_refuses_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    write_site = deploy.datasets.build.write_site

    def fail_at_second(folder: Path, *args: object) -> None:
        if folder.name == "site-2":
            raise OSError(code, "No space left on device" if code == errno.ENOSPC else "Permission denied")
        write_site(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(deploy.datasets.build, "write_site", fail_at_second)
    with pytest.raises(UserError, match=message):
        build_sites(array_source(), tmp_path / "out", Division(bag_size=8))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_sites(array_source(), tmp_path / "out", Division(bag_size=8), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_image_twice(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_sites(
        array_source(),
        tmp_path / "out",
        Division(bag_size=8),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (240, 240)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_training_needs_no_label_source_after_the_build(tmp_path: Path, split: list[str]) -> None:
    build_sites(
        array_source(split=split), tmp_path / "out", Division(sites=1, bag_size=8, split_column="split")
    )
    (tmp_path / "out/site-1/test.csv").unlink()
    shutil.rmtree(tmp_path / "out/site-1/test")
    assert len(BagStore.open(tmp_path / "out/site-1", 12)) == 12


MISSING = ["", "NaN", "nan", "NA", "n/a", "None", "NULL", "-", "unknown"]


@pytest.mark.parametrize("word", MISSING)
def test_images_without_a_patient_never_become_one_patient(tmp_path: Path, word: str) -> None:
    patients = [word if index % 2 else f"p{index // 8}" for index in range(96)]
    source = array_source(96, patient=patients)
    with pytest.raises(DataError, match=r"row 3: patient is (empty|missing): whose image is it") as caught:
        build_sites(source, tmp_path / "out", Division(sites=1, bag_size=8, group_column="patient"))
    assert len(caught.value.rows) == 48
    report = build_sites(
        source, tmp_path / "skip", Division(sites=1, bag_size=8, group_column="patient"), skip_bad=True
    )
    assert (report.used, report.quarantined) == (48, 48)
    alone = build_sites(
        source,
        tmp_path / "alone",
        Division(sites=1, bag_size=8, group_column="patient", missing_groups="alone"),
    )
    assert alone.sites[0].bag_size_max < 16
    assert any(
        note.startswith("48 image(s) without patient are each a group of its own") for note in alone.notes
    )
    with pytest.raises(UserError, match="write refuse or alone"):
        build_sites(source, tmp_path / "x", Division(group_column="patient", missing_groups="join"))


@pytest.mark.parametrize("options", [{"partition": "column:clinic"}, {"bags": "column:clinic", "sites": 1}])
@pytest.mark.parametrize("word", MISSING[:3])
def test_blank_cells_of_a_partition_column_are_bad_rows(
    tmp_path: Path, options: dict[str, object], word: str
) -> None:
    source = array_source(60, clinic=[word if index in (4, 5) else "north" for index in range(60)])
    with pytest.raises(DataError, match="clinic is") as caught:
        build_sites(source, tmp_path / "out", Division(bag_size=8, **options))  # type: ignore[arg-type]
    assert [row.row for row in caught.value.rows] == [6, 7]
    report = build_sites(source, tmp_path / "out", Division(bag_size=8, **options), skip_bad=True)  # type: ignore[arg-type]
    assert len(report.sites) == 1
    assert report.used == 58


def test_classes_written_in_two_ways_are_refused_whatever_the_source(tmp_path: Path) -> None:
    tree = Hierarchy.from_rows(("leaf",), [("Nevus",), ("nevus ",), ("mel",)])
    with pytest.raises(DataError, match="'nevus' and 'Nevus' differ only by case"):
        build_sites(replace(array_source(), hierarchy=tree), tmp_path / "out", Division(sites=1))
