"""Every objective in the loop, on a site folder; and the bounds on bags of one image, without labels."""

import ast
from pathlib import Path

import numpy as np
import pytest

import client.terms
from client.data.bags import BagStore
from client.site import SiteConfig, SitePolicy
from client.training import train_round
from common.config import RunConfig
from common.errors import DataError, UserError
from common.files import write_csv
from common.model.build import build_model
from common.model.methods import method_names, sees_labels
from common.model.model_file import all_arrays

BOUNDS = [method for method in method_names() if sees_labels(method)]


def configure(method: str) -> RunConfig:
    return RunConfig().with_changes(
        {
            "model.method": method,
            "model.image-size": 16,
            "train.held-back": 0.0,
            "model.atoms-per-class": 1,
        }
    )


def into_single_images(site: Path, *, minimum: int) -> Path:
    """The hand-made site with each of its 15 images as a bag of its own, and no label file."""
    (site / "test.csv").unlink()
    images = sorted((site / "images").glob("*.png"))
    labels = [("red", "green", "blue")[int(image.stem[1]) % 3] for image in images]
    write_csv(site / "manifest.csv", ("path", "bag_id"), [(f"images/{i.name}", i.stem) for i in images])
    counts = [(image.stem, label, 1) for image, label in zip(images, labels, strict=True)]
    write_csv(site / "bags.csv", ("bag_id", "label", "count"), counts)
    SiteConfig(name="site-1", policy=SitePolicy(minimum_bag_size=minimum)).save(site)
    return site


def moves(method: str, store: BagStore) -> bool:
    """Whether a round of training changes the heads; it must repeat itself bit for bit."""
    config, results = configure(method), []
    start = all_arrays(build_model(config.model, store.hierarchy, 0))
    for _ in range(2):
        model = build_model(config.model, store.hierarchy, 0)
        result = train_round(model, store, config, 2)
        assert np.isfinite(result.loss)
        results.append(all_arrays(model))
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])
    heads = [name for name in start if name.startswith("heads.") and name.endswith("weight")]
    return all(not np.array_equal(start[name], results[0][name]) for name in heads)


@pytest.mark.parametrize("method", [method for method in method_names() if method not in BOUNDS])
def test_it_trains_on_a_site_and_repeats(method: str, site: Path) -> None:
    assert moves(method, BagStore.open(site, 16))


@pytest.mark.parametrize("method", BOUNDS)
def test_a_bound_trains_on_single_images_where_the_owner_allows_them(method: str, site: Path) -> None:
    assert moves(method, BagStore.open(into_single_images(site, minimum=1), 16))


def test_no_site_allows_single_images_by_default(site: Path) -> None:
    into_single_images(site, minimum=SitePolicy().minimum_bag_size)
    with pytest.raises(DataError, match="minimum"):
        BagStore.open(site, 16)


@pytest.mark.parametrize("method", BOUNDS)
def test_a_bound_does_not_train_on_ordinary_bags(method: str, site: Path) -> None:
    store = BagStore.open(site, 16)
    config = configure(method)
    with pytest.raises(UserError, match="more than one image"):
        train_round(build_model(config.model, store.hierarchy, 0), store, config, 1)


def test_no_objective_can_reach_instance_labels() -> None:
    paths = list(Path(client.terms.__file__).parent.glob("*.py"))
    assert len(paths) > 8
    for path in paths:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                imported |= {module + name.name for name in node.names}
        assert imported or path.name == "__init__.py"  # of names as "client.batch.Batch"
        assert not {name for name in imported if name.startswith(("client.data.labelled", "deploy.datasets"))}
