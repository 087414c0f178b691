"""A model's figures belong to the test images, whatever their order in the table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import client.evaluation
from client.data.tables import TEST_FILE
from client.site import SiteConfig
from common.config import RunConfig
from common.files import write_csv
from common.hierarchy import Hierarchy
from common.model.build import build_model
from deploy.compare import scoring

TREE = Hierarchy.from_rows(["kind", "leaf"], [("a", "a1"), ("a", "a2"), ("b", "b1")])


def write_tests(folder: Path, images: np.ndarray, leaves: np.ndarray) -> Path:
    (folder / "test").mkdir(parents=True)
    rows = []
    for number, (pixels, leaf) in enumerate(zip(images, leaves, strict=True)):
        Image.fromarray(pixels).save(folder / "test" / f"{number:03d}.png")
        rows.append((f"test/{number:03d}.png", TREE.classes[-1][leaf]))
    write_csv(folder / TEST_FILE, ("path", "label"), rows)
    TREE.to_csv(folder / "hierarchy.csv")
    SiteConfig(name="test").save(folder)
    return folder


def test_the_order_of_the_test_images_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table's order the images of a class stand together, and shuffled they share every batch."""
    config = RunConfig().with_changes({"model.image-size": 16, "train.device": "cpu"})
    model = build_model(config.model, TREE, seed=1)
    rng = np.random.default_rng(0)
    leaves = np.repeat(np.arange(3), 8)
    images = (rng.integers(0, 256, (24, 16, 16, 3)) * (0.3 + 0.3 * leaves)[:, None, None, None]).astype(
        np.uint8
    )
    shuffled = rng.permutation(24)
    monkeypatch.setattr(scoring, "load_model", lambda run: (model, None))
    monkeypatch.setattr(client.evaluation, "_IMAGES_AT_ONCE", 8)
    device = torch.device("cpu")
    in_order = scoring.score(tmp_path, write_tests(tmp_path / "a", images, leaves), config, device)
    assert in_order[-1]["accuracies"]["argmax"] not in (0.0, 1 / 3, 1.0), (
        "it tells the classes apart a little"
    )
    mixed = write_tests(tmp_path / "b", images[shuffled], leaves[shuffled])
    assert scoring.score(tmp_path, mixed, config, device) == in_order
