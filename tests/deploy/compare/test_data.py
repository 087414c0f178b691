"""The data folders: every image once, the same test images for all, and no group in two sites."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.data.tables import read_csv
from client.site import site_folders
from common.errors import DataError, UserError
from deploy.compare.data import DataFolders, _folder_name, open_data
from deploy.compare.scenario import Cell, Context, Scenario, Setting, expand
from tests.deploy.compare.conftest import LEAVES, SIZE, TEST, TRAIN, write_archive
from tests.deploy.datasets.layouts import draw_image

Write = Callable[..., Path]
Prepared = tuple[DataFolders, dict[Setting, Cell], Cell]

ALL = """
[settings.pooled]
[settings.local-only]
[settings.federated]
[[methods]]
name = "dllp"
method = "dllp"
[[methods]]
name = "bound"
method = "supervised"
settings = ["pooled"]
"""


def silent(what: str) -> Callable[[int, int], None]:
    return lambda done, total: None


def prepare(path: Path, out: Path) -> tuple[DataFolders, list[Cell]]:
    scenario = Scenario.load(path)
    cells = expand(scenario, Context(path.parent))
    folders = DataFolders(out, open_data(scenario.data, path.parent), scenario.data.skip_bad)
    folders.prepare(cells, silent)
    return folders, cells


@pytest.fixture
def prepared(scenario: Write, tmp_path: Path) -> Prepared:
    """The folders of one small comparison, a cell of each setting, and the supervised one."""
    folders, cells = prepare(scenario(ALL), tmp_path / "data")
    of_setting = {cell.setting: cell for cell in cells if cell.method == "dllp"}
    return folders, of_setting, next(cell for cell in cells if cell.method == "bound")


def manifest(site: Path) -> Iterator[tuple[Path, str, str]]:
    """Image, bag and group of every training image of a site."""
    table = read_csv(site / "manifest.csv", ("path", "bag_id", "patient_id"), [], [])
    assert table is not None
    for _, row in table:
        yield site / row["path"], row["bag_id"], row["patient_id"]


def labels_by_image(archive: Path, split: str) -> dict[bytes, int]:
    with np.load(archive) as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y2_{split}"]
        return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def inodes(site: Path) -> set[int]:
    return {path.stat().st_ino for path, _, _ in manifest(site)}


def test_the_settings_train_on_the_same_images(prepared: Prepared) -> None:
    folders, cells, _ = prepared
    (pooled,) = site_folders(folders.sites_dir(cells[Setting.POOLED]))
    parts = site_folders(folders.sites_dir(cells[Setting.FEDERATED]))
    assert [site.name for site in parts] == ["site-1", "site-2"]
    assert len(inodes(pooled)) == TRAIN
    assert set.union(*map(inodes, parts)) == inodes(pooled), "hard links to one store"
    assert not set.intersection(*map(inodes, parts))
    last = cells[Setting.LOCAL_ONLY]
    assert last.site == 2
    assert folders.site_name(last) == "site-2"
    (alone,) = site_folders(folders.sites_dir(last))
    assert inodes(alone) == inodes(parts[1])
    assert folders.site_name(cells[Setting.POOLED]) is None


def test_a_group_is_never_in_two_sites_and_spans_bags(prepared: Prepared) -> None:
    """Tracks are four images of one class: in bags of 8 from whole tracks there would be two of each."""
    folders, cells, _ = prepared
    sites = site_folders(folders.sites_dir(cells[Setting.FEDERATED]))
    groups = [{group for _, _, group in manifest(site)} for site in sites]
    assert sum(map(len, groups)) == TRAIN // 4, "names are the site's own: a divided group would count twice"
    bags_of: dict[str, set[str]] = {}
    for _, bag, group in manifest(sites[0]):
        bags_of.setdefault(group, set()).add(bag)
    assert np.mean([len(bags) for bags in bags_of.values()]) > 2


def test_the_test_images_lie_apart_and_are_the_same_for_all(prepared: Prepared, archive: Path) -> None:
    folders, cells, bound = prepared
    for cell in (*cells.values(), bound):
        for site in site_folders(folders.sites_dir(cell)):
            assert not (site / "test.csv").exists(), "no label of an image where training looks"
    test = LabelledImages.open(folders.test, SIZE)
    assert test is not None
    assert len(test.labels) == TEST
    assert np.bincount(test.labels).tolist() == [TEST // LEAVES] * LEAVES
    assert labels_by_image(archive, "test") == {
        image.tobytes(): label for image, label in zip(test.images, test.labels, strict=True)
    }


def test_bags_of_one_image_are_labels(prepared: Prepared, archive: Path) -> None:
    folders, _, bound = prepared
    (site,) = site_folders(folders.sites_dir(bound))
    store = BagStore.open(site, SIZE)
    assert store.config.policy.minimum_bag_size == 1
    assert len(store) == TRAIN
    label_of = labels_by_image(archive, "train")
    for bag in (store[number] for number in range(0, TRAIN, 17)):
        assert bag.counts.tolist() == np.eye(LEAVES)[label_of[bag.images[0].tobytes()]].tolist()


def test_bags_hold_their_images_counts(prepared: Prepared, archive: Path) -> None:
    folders, cells, _ = prepared
    (site,) = site_folders(folders.sites_dir(cells[Setting.POOLED]))
    store = BagStore.open(site, SIZE)
    assert store.config.policy.minimum_bag_size == 4
    label_of = labels_by_image(archive, "train")
    for bag in (store[number] for number in range(len(store))):
        labels = [label_of[image.tobytes()] for image in bag.images]
        assert bag.counts.tolist() == np.bincount(labels, minlength=LEAVES).tolist()


def test_nothing_is_made_twice(scenario: Write, tmp_path: Path) -> None:
    path = scenario(ALL)
    folders, cells = prepare(path, tmp_path / "data")
    stamps = {file: file.stat().st_mtime_ns for file in folders.root.rglob("*.csv")}
    caches = {file: file.stat().st_ino for file in folders.root.rglob("images.npy")}
    again, _ = prepare(path, tmp_path / "data")
    assert again.root == folders.root
    assert {file: file.stat().st_mtime_ns for file in folders.root.rglob("*.csv")} == stamps
    assert {file: file.stat().st_ino for file in folders.root.rglob("images.npy")} == caches
    divided = {_folder_name(cell.division) for cell in cells}
    assert {folder.name for folder in folders.root.iterdir()} == {
        "images", "images.json", "test", *divided, *(f"{name}.alone" for name in divided),
    }  # fmt: skip


def test_other_pixels_are_other_data(scenario: Write, tmp_path: Path, archive: Path) -> None:
    data = Scenario.load(scenario()).data
    with np.load(archive) as arrays:
        changed = arrays["x_test"].copy()
    changed[3, 0, 0, 0] ^= 1
    other = write_archive(tmp_path / "other.npz", x_test=changed)
    same = write_archive(tmp_path / "same.npz")
    digests = [open_data(data, tmp_path, path).digest for path in (None, same, other)]
    assert digests[0] == digests[1], "the place of the file does not count"
    assert digests[0] != digests[2]


def test_a_limit_takes_whole_groups(scenario: Write, tmp_path: Path) -> None:
    path = scenario(sites="2\nlimit = 30")
    opened = open_data(Scenario.load(path).data, tmp_path)
    groups = [opened.table.columns["group"][index] for index in opened.train]
    assert len(groups) == 28
    assert all(groups.count(group) == 4 for group in groups)
    assert len(opened.test) == 30


def test_a_test_share_takes_whole_groups(scenario: Write, tmp_path: Path) -> None:
    opened = open_data(Scenario.load(scenario(sites="2\ntest-share = 0.25")).data, tmp_path)
    assert len(opened.train) + len(opened.test) == TRAIN + TEST
    assert 0.2 < len(opened.test) / (TRAIN + TEST) <= 0.25
    column = opened.table.columns["group"]
    assert not {column[index] for index in opened.train} & {column[index] for index in opened.test}


def test_levels_can_be_named(scenario: Write, tmp_path: Path) -> None:
    opened = open_data(Scenario.load(scenario(sites='2\nlevels = ["kind", "leaf"]')).data, tmp_path)
    assert opened.table.hierarchy.levels == ("kind", "leaf")
    with pytest.raises(UserError, match=r"names 1 levels, but small.npz has 2: level_1, level_2"):
        open_data(Scenario.load(scenario(sites='2\nlevels = ["kind"]')).data, tmp_path)


def test_a_group_on_both_sides_of_the_split_is_refused(scenario: Write, tmp_path: Path) -> None:
    shared = write_archive(tmp_path / "shared.npz", track_test=np.arange(TEST))
    with pytest.raises(UserError, match=r"48 group\(s\) of column 'group' have training and test images"):
        open_data(Scenario.load(scenario()).data, tmp_path, shared)


def test_where_to_get_data_that_are_missing(scenario: Write, tmp_path: Path) -> None:
    path = scenario(path='"nowhere/x.npz"\norigin = "Ask for it at example.org."')
    with pytest.raises(UserError) as caught:
        open_data(Scenario.load(path).data, tmp_path)
    assert f"not found: {tmp_path / 'nowhere/x.npz'}" in str(caught.value)
    assert "Ask for it at example.org." in str(caught.value)
    assert "--data" in str(caught.value)


def test_rows_that_are_bad(scenario: Write, tmp_path: Path) -> None:
    labels = np.arange(TRAIN) // 4 % LEAVES
    wrong = labels // 2
    wrong[5] = 1 - wrong[5]
    faulty = write_archive(tmp_path / "faulty.npz", y1_train=wrong)
    with pytest.raises(DataError, match="skip-bad = true"):
        open_data(Scenario.load(scenario()).data, tmp_path, faulty)
    opened = open_data(Scenario.load(scenario(sites="2\nskip-bad = true")).data, tmp_path, faulty)
    assert len(opened.train) == TRAIN - 1


def test_a_source_without_a_split(tmp_path: Path) -> None:
    for leaf in ("a", "b"):
        for number in range(20):
            draw_image(tmp_path / "in" / leaf / f"{number}{leaf}.png")
    text = """
bag-sizes = [4]
seeds = [0]
passes = 1
images-per-step = 8
[data]
source = "folders"
path = "in"
{more}
[run]
model.image-size = 8
[[methods]]
name = "dllp"
method = "dllp"
"""
    path = tmp_path / "scenario.toml"
    path.write_text(text.format(more=""))
    with pytest.raises(UserError, match="say split-column or test-share"):
        open_data(Scenario.load(path).data, tmp_path)
    path.write_text(text.format(more="test-share = 0.2"))
    folders, (cell,) = prepare(path, tmp_path / "data")
    (site,) = site_folders(folders.sites_dir(cell))
    assert BagStore.open(site, 8).summary.used == 32


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    for split, number in (("train", 12), ("test", 4)):
        for index in range(number):
            draw_image(tmp_path / "in" / split / "ab"[index % 2] / f"{split}{index}.png")
    (tmp_path / "in/train/a/train2.png").write_bytes(b"no image")
    path = tmp_path / "scenario.toml"
    text = "bag-sizes = [4]\nseeds = [0]\npasses = 1\nimages-per-step = 8\n[data]\n"
    text += 'source = "folders"\npath = "in"\n'
    rest = '[run]\nmodel.image-size = 8\n[[methods]]\nname = "dllp"\nmethod = "dllp"\n'
    path.write_text(text + rest)
    with pytest.raises(DataError, match=r"train2.png cannot be decoded"):
        prepare(path, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [], "nothing half made"
    path.write_text(text + "skip-bad = true\n" + rest)
    folders, (cell,) = prepare(path, tmp_path / "data")
    assert BagStore.open(site_folders(folders.sites_dir(cell))[0], 8).summary.used == 11


def test_bags_of_a_column_must_be_able_to_have_their_size(scenario: Write, tmp_path: Path) -> None:
    """The tracks have four images each."""
    folders, (cell,) = prepare(scenario(sites='2\nbags = "column:group"', bag_sizes="[4]"), tmp_path / "data")
    assert folders.images_per_bag(cell) == 4
    with pytest.raises(UserError, match=r"no value has the 8 training images of a bag \(the most is 4\)"):
        prepare(scenario(sites='2\nbags = "column:group"'), tmp_path / "data")
