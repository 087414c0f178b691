"""Synthetic lesions: deterministic, with every class visible and every hospital different."""

from pathlib import Path

import numpy as np
import pytest

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.datasets.synthetic import (
    _draw_lesions,
    lesion_hierarchy,
    synthetic_source,
)

PLAIN = np.ones(3, dtype=np.float32)


def test_the_tree_has_3_9_27_classes() -> None:
    assert lesion_hierarchy().sizes == (3, 9, 27)


def test_the_seed_fixes_the_images() -> None:
    leaves = np.arange(100) % 27
    first = _draw_lesions(leaves, 24, PLAIN, np.random.default_rng(1))
    assert first.shape == (100, 24, 24, 3)
    assert np.array_equal(first, _draw_lesions(leaves, 24, PLAIN, np.random.default_rng(1)))
    assert len(np.unique(first.reshape(100, -1), axis=0)) == 100


def features(images: np.ndarray) -> np.ndarray:
    """Lesion area, emptiness of the middle, colour of the lesion, and its roughness: shape (N, 6)."""
    values = images.astype(float) / 255
    skin = np.median(values[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)
    far = np.abs(values - skin[:, None, None]).sum(axis=3)
    mask = far > 0.5
    area = mask.mean(axis=(1, 2))
    middle = far[:, 20:28, 20:28].mean(axis=(1, 2))
    colour = (values * mask[..., None]).sum(axis=(1, 2)) / (mask.sum(axis=(1, 2)) + 1)[:, None]
    rough = np.abs(np.diff(values[..., 0], axis=1))[:, :, :-1][mask[:, 1:, :-1]].mean() * np.ones(len(images))
    return np.column_stack([area, middle, colour / skin, rough])


@pytest.mark.parametrize(("level", "least"), [(0, 0.8), (1, 0.6)])
def test_coarse_levels_show_in_the_simplest_features(level: int, least: float) -> None:
    leaves = np.tile(np.arange(27), 30)
    measured = features(_draw_lesions(leaves, 48, PLAIN, np.random.default_rng(0)))
    measured = (measured - measured.mean(axis=0)) / (measured.std(axis=0) + 1e-9)
    classes = lesion_hierarchy().paths[leaves][:, level]
    half = len(leaves) // 2
    means = np.stack([measured[:half][classes[:half] == c].mean(axis=0) for c in range(classes.max() + 1)])
    nearest = ((measured[half:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == classes[half:]).mean() > least


def test_stain_shifts_the_colour() -> None:
    leaves = np.zeros(50, dtype=np.int64)
    warm = _draw_lesions(leaves, 24, np.array([1.1, 1.0, 0.9], dtype=np.float32), np.random.default_rng(0))
    plain = _draw_lesions(leaves, 24, PLAIN, np.random.default_rng(0))
    shift = warm.mean(axis=(0, 1, 2)) / plain.mean(axis=(0, 1, 2))
    assert shift[0] > 1.02
    assert shift[2] < 0.92


def test_sites_are_complete_and_unlike_one_another(tmp_path: Path) -> None:
    out = tmp_path / "sites"
    write_synthetic_sites(
        out, SyntheticHospitals(sites=3, seed=4, images_per_site=160, image_size=16, test_images_per_site=32)
    )
    stores = [BagStore.open(folder, 16) for folder in sorted(out.iterdir())]
    assert [store.name for store in stores] == ["hospital-1", "hospital-2", "hospital-3"]
    assert all(store.bag_sizes.tolist() == [16] * 10 for store in stores)
    assert all(store.summary.resized == 0 for store in stores)
    test = LabelledImages.open(out / "hospital-1", 16)
    assert test is not None
    assert len(test.labels) == 32
    mixes = np.stack([store.leaf_counts.sum(axis=0) for store in stores])
    assert np.abs(np.diff(mixes, axis=0)).sum() > 50


def test_sessions_differ_more_than_random_bags_would() -> None:
    table = synthetic_source(
        SyntheticHospitals(sites=1, images_per_site=1600, image_size=8, test_images_per_site=0)
    )
    counts = np.stack([np.bincount(bag, minlength=27) for bag in table.labels.reshape(-1, 16)])
    shuffled = np.random.default_rng(0).permutation(table.labels).reshape(-1, 16)
    at_random = np.stack([np.bincount(bag, minlength=27) for bag in shuffled])
    assert counts.var(axis=0).sum() > 3 * at_random.var(axis=0).sum()
