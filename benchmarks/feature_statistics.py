"""Make the statistics of public images that ship with fixed features.

    python benchmarks/feature_statistics.py [FEATURE ...]

The public images are drawn by this script: overlapping discs and rectangles of random colours, sizes and
shades, an old model of natural images ("dead leaves", Matheron 1968; Lee, Mumford & Huang 2001). Nobody's
rights or patients are in them. It writes common/model/features/statistics/FEATURE.json.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from client.data.images import to_tensor
from common import parts
from common.model.features.bank import STATISTICS, Standard
from common.parts import Kind

KEPT = {"colour-histogram": 128, "gabor": 32}
"""Directions kept; the rest varies little and would take as much noise. Of networks: ``MOST``."""
MOST = 64
FEATURES = ("colour-histogram", "gabor", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
SIDE, LEAVES, IMAGES = 48, 48, 4000


def dead_leaves(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one picture, shape (SIDE, SIDE, 3)."""
    axis = (np.arange(SIDE) + 0.5) / SIDE
    down, across = np.meshgrid(axis, axis, indexing="ij")
    ground, spread = rng.uniform(0, 1, 3), rng.uniform(0.05, 0.4)
    picture = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    # Sizes of a Pareto law, so that the statistics are those of a scene seen from any distance.
    for radius in np.clip(0.06 / (1 - 0.97 * rng.random(LEAVES)), 0.05, 0.5):
        x, y = rng.uniform(-0.1, 1.1, 2)
        dx, dy, angle = across - x, down - y, rng.uniform(0, np.pi)
        along = dx * np.cos(angle) + dy * np.sin(angle)
        aside = (dy * np.cos(angle) - dx * np.sin(angle)) / rng.uniform(0.5, 1)
        disc = along**2 + aside**2 < radius**2
        leaf = disc if rng.random() < 0.5 else np.maximum(abs(along), abs(aside)) < radius
        colour = ground + spread * (rng.normal() + 0.5 * rng.normal(size=3))
        shade = (dx * rng.normal() + dy * rng.normal())[leaf][:, None] / 2
        grain = rng.normal(size=(leaf.sum(), 1)) * rng.uniform(0, 0.06)
        picture[leaf] = colour + shade + grain
    return np.asarray((picture.clip(0, 1) * 255).round(), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", nargs="*", metavar="FEATURE", help=", ".join(FEATURES))
    wanted = parser.parse_args().features or FEATURES
    rng = np.random.default_rng(0)
    images = [dead_leaves(rng) for _ in track(range(IMAGES), "drawing")]
    STATISTICS.mkdir(exist_ok=True)
    for name in wanted:
        extractor = parts.part(Kind.BACKBONE, name).build(SIDE).eval()
        with torch.no_grad():
            found = [
                extractor(to_tensor(np.stack(images[start : start + 64])))
                for start in track(range(0, IMAGES, 64), name)
            ]
        statistics = Standard.of(torch.cat(found), KEPT.get(name, MOST))
        (STATISTICS / f"{name}.json").write_text(statistics.to_json(), encoding="ascii")


if __name__ == "__main__":
    main()
