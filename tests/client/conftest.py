"""What the tests of the data side share: a site folder written by hand, in the format of the contract."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from client.site import SiteConfig
from common.files import write_csv

LEAVES = ("red", "green", "blue")
COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
TREE = [("warm", "red"), ("cold", "green"), ("cold", "blue")]


def paint(path: Path, label: str, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    """An image of one colour, in the mode and format asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[label]).convert(mode).save(path)


def write_hand_made_site(folder: Path) -> Path:
    """Three bags of 4, 5 and 6 images, and three test images. Bag b2 holds 2 red, 2 green and 1 blue."""
    manifest, counts = [], []
    for number, size in enumerate((4, 5, 6), start=1):
        labels = [LEAVES[index % 3] for index in range(size)]
        for index, label in enumerate(labels):
            paint(folder / "images" / f"{number}{index}.png", label)
            manifest.append((f"images/{number}{index}.png", f"b{number}"))
        counts += [(f"b{number}", label, labels.count(label)) for label in LEAVES]
    for label in LEAVES:
        paint(folder / "test" / f"{label}.png", label)
    write_csv(folder / "manifest.csv", ("path", "bag_id"), manifest)
    write_csv(folder / "bags.csv", ("bag_id", "label", "count"), counts)
    write_csv(folder / "hierarchy.csv", ("warmth", "colour"), TREE)
    write_csv(folder / "test.csv", ("path", "label"), [(f"test/{name}.png", name) for name in LEAVES])
    SiteConfig(name="site-1").save(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A fresh hand-made site folder."""
    return write_hand_made_site(tmp_path / "site")


@pytest.fixture
def edit(site: Path) -> Callable[[str, str, str], None]:
    """Replace text in a file of the site; the text must be there."""

    def replace(file: str, old: str, new: str) -> None:
        text = (site / file).read_text(encoding="utf-8")
        assert old in text
        (site / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return replace
