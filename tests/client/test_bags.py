"""The bag store on good folders: bags, cache, split; and every kind of bad folder."""

import ast
import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import client.data.images
from client.data.bags import BagStore
from client.data.images import to_tensor
from client.data.labelled import LabelledImages
from common.errors import DataError, UserError

from .conftest import COLOURS, paint

Edit = Callable[[str, str, str], None]


def refuse(site: Path) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(DataError) as caught:
        BagStore.open(site, 8)
    return str(caught.value)


def caches(site: Path) -> list[str]:
    return sorted(path.name for path in (site / ".cache").iterdir())


def test_bags_hold_their_images_and_counts(site: Path) -> None:
    store = BagStore.open(site, 8)
    assert (len(store), store.name) == (3, "site-1")
    assert store.bag_sizes.tolist() == [4, 5, 6]
    # The leaves stand in the order of hierarchy.csv.
    assert store.leaf_counts.tolist() == [[2, 1, 1], [2, 2, 1], [2, 2, 2]]
    bag = store[1]
    assert bag.bag_id == "b2"
    assert bag.images.shape == (5, 8, 8, 3)
    assert bag.images.dtype == np.uint8
    assert bag.counts.tolist() == [2, 2, 1]
    assert [tuple(image[4, 4]) for image in bag.images[:3]] == list(COLOURS.values())
    assert not bag.images.flags.writeable
    assert np.shares_memory(bag.images, store[1].images)
    with pytest.raises(IndexError):
        store[3]


def test_the_summary_counts_resized_and_converted_images(site: Path) -> None:
    paint(site / "images/10.png", "red", size=(40, 20))
    paint(site / "images/11.png", "red", mode="L")
    paint(site / "images/12.png", "red", mode="RGBA")
    paint(site / "images/13.png", "red", mode="P")
    paint(site / "images/20.png", "red", size=(8, 8))
    (site / "images/21.png").unlink()
    paint(site / "images/21.jpg", "red", mode="CMYK")
    (site / "images/21.jpg").rename(site / "images/21.png")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 16).save(site / "images/22.png")
    store = BagStore.open(site, 8)
    assert store.summary.converted == 5
    assert store.summary.resized == 14
    assert (store.summary.listed, store.summary.used, store.summary.quarantined) == (15, 15, 0)
    deep = store[1].images[2]
    assert deep.min() < 20, "16-bit grey is stretched, not cut off"
    assert deep.max() > 235
    assert tuple(store[0].images[2][0, 0]) == COLOURS["red"]


def test_the_shorter_side_is_resized_and_the_centre_cut_out(site: Path) -> None:
    stripes = Image.new("RGB", (48, 16), (0, 0, 255))
    stripes.paste((255, 0, 0), (16, 0, 32, 16))
    stripes.save(site / "images/10.png")
    image = BagStore.open(site, 8)[0].images[0]
    assert (image == np.array([255, 0, 0])).mean() > 0.8


def test_the_cache_is_reused_and_rebuilt_when_the_data_change(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    first = BagStore.open(site, 8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(15, 15)]
    with monkeypatch.context() as patch:
        patch.setattr(client.data.images, "_decode", None)  # decoding again would now fail
        again = BagStore.open(site, 8, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 1
    assert np.array_equal(again[2].images, first[2].images)
    BagStore.open(site, 12)
    assert len(caches(site)) == 2, "runs of two sizes do not take each other's away"

    paint(site / "images/10.png", "blue")
    changed = BagStore.open(site, 8)
    assert changed.data_version != first.data_version
    assert tuple(changed[0].images[0][4, 4]) == COLOURS["blue"]
    assert tuple(first[0].images[0][4, 4]) == COLOURS["red"], "an open store keeps its images"
    assert len(caches(site)) == 1, "the old version is gone"


def test_runs_of_different_sizes_decode_once_each(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (8, 12):
        BagStore.open(site, size)
    monkeypatch.setattr(client.data.images, "_decode", None)  # decoding again would now fail
    for size in (8, 12, 8, 12):
        assert BagStore.open(site, size)[0].images.shape[1] == size


def test_a_cache_that_never_stays_is_one_clear_error(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(target: Path) -> object:
        client.data.images._remove(target)
        raise FileNotFoundError(target)

    monkeypatch.setattr(client.data.images, "_map", gone)
    with pytest.raises(UserError, match="removed by other runs"):
        BagStore.open(site, 8)


def test_of_many_sizes_those_used_last_are_kept(site: Path) -> None:
    for age, size in ((40, 8), (30, 10), (20, 12)):
        BagStore.open(site, size)
        (folder,) = (site / ".cache").glob(f"bags-{size}-*")
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    BagStore.open(site, 8)
    BagStore.open(site, 14)
    assert sorted(int(name.split("-")[1]) for name in caches(site)) == [8, 12, 14]


def test_a_cache_that_another_process_removes_meanwhile_is_built_anew(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BagStore.open(site, 8)
    whole, removed = client.data.images._map, list[Path]()

    def removed_first(target: Path) -> object:
        if not removed:
            client.data.images._remove(target)
            removed.append(target)
        return whole(target)

    monkeypatch.setattr(client.data.images, "_map", removed_first)
    assert len(BagStore.open(site, 8)) == 3
    assert len(caches(site)) == 1


@pytest.mark.parametrize("file", ["manifest.csv", "bags.csv", "hierarchy.csv"])
def test_the_data_version_covers_the_tables_but_not_the_test_labels(site: Path, file: str) -> None:
    before = BagStore.open(site, 8).data_version
    (site / "test.csv").unlink()
    assert BagStore.open(site, 8).data_version == before
    (site / file).write_text((site / file).read_text() + "\n")
    assert BagStore.open(site, 8).data_version != before


def test_leftovers_of_killed_processes_are_removed_once_stale(site: Path) -> None:
    for name, age in (("tmp-old", 2 * client.data.images._STALE_SECONDS), ("tmp-new", 0)):
        folder = site / ".cache" / name
        folder.mkdir(parents=True)
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    BagStore.open(site, 8)
    assert "tmp-old" not in caches(site)
    assert "tmp-new" in caches(site)


def test_two_processes_that_build_at_once_end_with_one_cache(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = client.data.images._decode

    def other_process_wins(path: Path, size: int, *read: object) -> object:
        monkeypatch.setattr(client.data.images, "_decode", decode)
        BagStore.open(site, 8)
        return decode(path, size, *read)

    monkeypatch.setattr(client.data.images, "_decode", other_process_wins)
    assert len(BagStore.open(site, 8)) == 3
    assert len(caches(site)) == 1


@given(held_back=st.floats(0, 0.999), seed=st.integers(0, 2**31))
def test_split_is_a_partition_that_never_holds_back_everything(held_back: float, seed: int) -> None:
    store = _store_of(7)
    train, held = store.split(held_back, seed)
    assert sorted([*train, *held]) == list(range(7))
    assert len(train) >= 1
    assert (len(held) >= 1) == (held_back > 0)
    again = store.split(held_back, seed)
    assert np.array_equal(train, again[0])


def test_split_depends_on_the_site_and_leaves_a_single_bag_alone() -> None:
    assert _store_of(1).split(0.5, 0)[0].tolist() == [0]
    splits = {tuple(_store_of(40, name).split(0.5, 0)[1]) for name in ("a", "b", "c")}
    assert len(splits) == 3


def _store_of(bags: int, name: str = "x") -> BagStore:
    """A store without files, for what needs only the number of bags."""
    from client.data.bags import _StoreSummary
    from client.site import SiteConfig
    from common.hierarchy import Hierarchy

    return BagStore(
        config=SiteConfig(name=name),
        hierarchy=Hierarchy.from_rows(["level"], [["leaf"]]),
        data_version="",
        summary=_StoreSummary(0, 0, 0, 0, 0, 0, 0),
        bag_ids=tuple(map(str, range(bags))),
        leaf_counts=np.zeros((bags, 1), dtype=np.int64),
        bag_sizes=np.zeros(bags, dtype=np.int64),
        _starts=np.zeros(bags, dtype=np.int64),
        _images=np.zeros((0, 8, 8, 3), dtype=np.uint8),
    )


def test_to_tensor_scales_and_leaves_the_cache_alone(site: Path) -> None:
    images = BagStore.open(site, 8)[0].images
    tensor = to_tensor(images)
    assert tensor.shape == (4, 3, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    expected = torch.tensor(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(tensor, expected)


# --- bad folders ---------------------------------------------------------------------------------------


def test_an_unreadable_and_a_truncated_image(site: Path) -> None:
    (site / "images/10.png").write_text("not an image")
    whole = (site / "images/21.png").read_bytes()
    (site / "images/21.png").write_bytes(whole[: len(whole) // 2])
    text = refuse(site)
    assert "manifest.csv, row 2: 'images/10.png': the image cannot be decoded (not an image file" in text
    assert "manifest.csv, row 7: 'images/21.png': the image cannot be decoded" in text
    assert refuse(site) == text, "the cache remembers"


def test_an_image_of_too_many_pixels(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.data.images, "_MAX_PIXELS", 200)
    assert "16 x 16 pixels are more than the 200 pixels that one image may have" in refuse(site)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("manifest.csv", "images/10.png", "images/99.png", "row 2: 'images/99.png': No such file"),
        ("manifest.csv", "images/10.png", "/etc/hostname", "row 2: '/etc/hostname' leads out"),
        ("manifest.csv", "images/10.png", "images/../../x.png", "row 2: 'images/../../x.png' leads out"),
        ("manifest.csv", "images/10.png", "images", "row 2: 'images' is not a file"),
        ("manifest.csv", "images/10.png", "", "row 2: path is empty"),
        ("manifest.csv", "images/10.png,b1", "images/10.png,", "row 2: bag_id is empty"),
        ("manifest.csv", "images/11.png", "images/10.png", "row 3: 'images/10.png' stands already in row 2"),
        ("manifest.csv", "images/10.png,b1", "images/10.png", "row 2: 1 cells where the header has 2"),
        ("manifest.csv", "images/10.png,b1", "images/10.png,b2", "counts 4 images, manifest.csv lists 3"),
        ("manifest.csv", "images/10.png,b1", "images/10.png,b9", "row 2: bag 'b9' has no row in bags.csv"),
        ("bags.csv", "b1,red,2", "b1,purple,2", "row 2: unknown label 'purple'"),
        ("bags.csv", "b1,red,2", "b1,warm,2", "row 2: label 'warm' is a class of level warmth"),
        ("bags.csv", "b1,red,2", "b1,RED,2", "no leaf of the hierarchy; did you mean 'red'?"),
        ("bags.csv", "b1,red,2", "b1,red,3", "row 2: bag 'b1' counts 5 images, manifest.csv lists 4"),
        ("bags.csv", "b1,red,2", "b1,red,-2", "row 2: count '-2' is not a whole number"),
        ("bags.csv", "b1,red,2", "b1,red,2.5", "row 2: count '2.5' is not a whole number"),
        ("bags.csv", "b1,red,2", "b1,red,", "row 2: count '' is not a whole number"),
        ("bags.csv", "b1,green,1", "b1,red,1", "row 3: label 'red' is counted twice"),
        ("bags.csv", "b1,red,2", "b9,red,2", "row 2: bag 'b9' has no row in manifest.csv"),
        ("bags.csv", "label", "tag", "row 1: the header lacks column(s) ['label']"),
        ("bags.csv", "b1,red,2", 'b1,"red,2', "is not CSV"),
        ("manifest.csv", "path,", "file,", "row 1: the header lacks column(s) ['path']"),
        ("manifest.csv", "path,bag_id", "path,path", "lacks column(s) ['bag_id']"),
        (
            "hierarchy.csv",
            "cold,green",
            "cold,green\ncold,Green",
            "colour 'Green' and 'green' differ only by",
        ),
        ("hierarchy.csv", "cold,green", "cold", "hierarchy.csv, row 3: 2 non-empty cells"),
        ("hierarchy.csv", "cold,green", "cold,red", "hierarchy.csv, row 3: colour 'red' has another parent"),
        ("site.toml", "minimum-bag-size = 4", "minimum-bag-size = 5", "bag 'b1' holds 4 image(s), the min"),
    ],
)
def test_a_bad_row_is_named_with_its_file(
    site: Path, edit: Edit, file: str, old: str, new: str, expected: str
) -> None:
    edit(file, old, new)
    text = refuse(site)
    assert expected in text
    assert "Mend these" in text


def test_bad_rows_of_all_files_come_in_one_error(site: Path, edit: Edit) -> None:
    edit("manifest.csv", "images/10.png", "../10.png")
    edit("bags.csv", "b2,red", "b2,purple")
    (site / "images/30.png").write_bytes(b"")
    text = refuse(site)
    assert all(part in text for part in ("'../10.png'", "'purple'", "'images/30.png'"))


def test_several_unusable_files_come_in_one_error(site: Path, edit: Edit) -> None:
    (site / "manifest.csv").write_bytes(b"path,bag_id\nimages/10.png,b1\nimages/\xff.png,b1\n")
    (site / "bags.csv").unlink()
    edit("hierarchy.csv", "cold,green", ",green")
    text = refuse(site)
    assert "manifest.csv, row 3: is not UTF-8" in text
    assert "bags.csv: cannot be read: No such file" in text
    assert "hierarchy.csv, row 3" in text


def test_links_that_lead_out_are_refused_and_others_followed(site: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere/out.png", "red")
    (site / "images/10.png").unlink()
    (site / "images/10.png").symlink_to(tmp_path / "elsewhere/out.png")
    assert "'images/10.png' is a link that leads out" in refuse(site)
    (site / "images/10.png").unlink()
    (site / "images/10.png").symlink_to("11.png")
    assert len(BagStore.open(site, 8)) == 3
    shutil.move(site / "images", tmp_path / "moved")
    (site / "images").symlink_to(tmp_path / "moved")
    assert "is a link that leads out" in refuse(site)


def test_an_empty_site_and_one_whose_bags_are_all_bad(site: Path) -> None:
    (site / "images/10.png").write_bytes(b"")
    (site / "images/20.png").write_bytes(b"")
    (site / "images/30.png").write_bytes(b"")
    with pytest.raises(DataError, match="no usable bag"):
        BagStore.open(site, 8, skip_bad=True)
    (site / "manifest.csv").write_text("path,bag_id\n")
    (site / "bags.csv").write_text("bag_id,label,count\n")
    assert "holds no usable image" in refuse(site)


def test_skip_bad_leaves_out_whole_bags_and_lists_why(site: Path, edit: Edit) -> None:
    (site / "images/10.png").write_bytes(b"broken")
    edit("bags.csv", "b3,red", "b3,purple")
    store = BagStore.open(site, 8, skip_bad=True)
    assert store.bag_ids == ("b2",)
    assert store[0].counts.sum() == len(store[0].images) == 5
    assert tuple(store[0].images[1][4, 4]) == COLOURS["green"]
    summary = store.summary
    assert (summary.listed, summary.used, summary.quarantined) == (15, 5, 10)
    assert (summary.bags_listed, summary.bags_used) == (3, 1)
    listed = (site / "quarantine.csv").read_text().splitlines()
    assert listed[0] == "file,row,reason"
    assert listed[1].startswith("bags.csv,8,")
    assert listed[2].startswith("manifest.csv,2,")
    paint(site / "images/10.png", "red")
    edit("bags.csv", "b3,purple", "b3,red")
    assert len(BagStore.open(site, 8, skip_bad=True)) == 3
    assert not (site / "quarantine.csv").exists(), "nothing is left to list"


def test_skip_bad_does_not_overlook_an_unusable_file(site: Path) -> None:
    (site / "bags.csv").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        BagStore.open(site, 8, skip_bad=True)


def test_a_full_disk_says_how_many_bytes_are_needed_and_leaves_no_cache(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: object, header: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"disk is full.* needs 2,880 bytes"):
        BagStore.open(site, 8)
    assert caches(site) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(site: Path) -> None:
    site.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            BagStore.open(site, 8)
    finally:
        site.chmod(stat.S_IRWXU)


def test_a_cache_that_cannot_be_written(site: Path) -> None:
    (site / ".cache").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written: (Not a directory|File exists)"):
        BagStore.open(site, 8)


# --- labelled test images ------------------------------------------------------------------------------


def test_labelled_images_have_the_index_of_their_leaf(site: Path) -> None:
    test = LabelledImages.open(site, 8)
    assert test is not None
    assert test.images.shape == (3, 8, 8, 3)
    assert test.labels.tolist() == [0, 1, 2]
    assert [tuple(image[4, 4]) for image in test.images] == list(COLOURS.values())


def test_no_test_table_or_an_empty_one_gives_none(site: Path) -> None:
    (site / "test.csv").write_text("path,label\n")
    assert LabelledImages.open(site, 8) is None
    (site / "test.csv").unlink()
    assert LabelledImages.open(site, 8) is None


def test_bad_test_rows_are_listed_together_or_skipped(site: Path, edit: Edit) -> None:
    edit("test.csv", "test/red.png,red", "test/red.png,purple")
    edit("test.csv", "test/green.png", "../green.png")
    with pytest.raises(DataError) as caught:
        LabelledImages.open(site, 8)
    assert "test.csv, row 2: unknown label 'purple'" in str(caught.value)
    assert "test.csv, row 3: '../green.png' leads out" in str(caught.value)
    kept = LabelledImages.open(site, 8, skip_bad=True)
    assert kept is not None
    assert (kept.labels.tolist(), kept.listed) == ([2], 3)


def test_broken_test_images_are_left_out(site: Path) -> None:
    (site / "test/green.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"test.csv, row 3: 'test/green.png'"):
        LabelledImages.open(site, 8)
    kept = LabelledImages.open(site, 8, skip_bad=True)
    assert kept is not None
    assert kept.labels.tolist() == [0, 2]
    assert tuple(kept.images[1][4, 4]) == COLOURS["blue"]


def test_the_bag_store_works_without_any_label_source(site: Path) -> None:
    BagStore.open(site, 8)
    (site / "test.csv").unlink()
    shutil.rmtree(site / "test")
    assert len(BagStore.open(site, 8)) == 3


@pytest.mark.parametrize(
    "module",
    ["data/bags", "data/batch", "data/tables", "data/images", "training"],
)
def test_what_training_reads_never_imports_the_labelled_images(module: str) -> None:
    path = Path(client.data.images.__file__).parents[1] / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "client.data.labelled" not in imported
    assert not any(name and name.startswith("deploy.datasets") for name in imported)
