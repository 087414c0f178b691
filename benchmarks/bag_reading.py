"""Compare reading a site's bags from the cache with decoding the image files each time.

    python benchmarks/bag_reading.py --json

Both ways give the same float tensors, bag by bag. Small PNGs are the hardest case for the cache, because they
are the cheapest to decode.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from client.data.bags import BagStore
from client.data.images import decode_all, to_tensor
from common.hierarchy import Hierarchy
from deploy.datasets.build import build_sites
from deploy.datasets.files import FileImages, SourceTable
from deploy.datasets.options import Division

REPEATS = 5


def write_images(folder: Path, number: int, width: int, height: int, suffix: str) -> SourceTable:
    """Write smooth random images with a little noise, which compress about as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{index}{suffix}")
        Image.fromarray(noisy).save(paths[-1])
    return SourceTable(
        file="benchmark",
        images=FileImages(paths),
        labels=np.arange(number) % 4,
        hierarchy=Hierarchy.from_rows(["class"], [[f"class-{leaf}"] for leaf in range(4)]),
        lines=[None] * number,
    )


def best(action: Callable[[], object]) -> float:
    """Return the shortest time of some runs, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, number: int, width: int, height: int, suffix: str, size: int) -> dict[str, object]:
    """Return the times of one pass over all bags, read in both ways."""
    with tempfile.TemporaryDirectory() as scratch:
        source = write_images(Path(scratch) / "images", number, width, height, suffix)
        build_sites(source, Path(scratch) / "sites", Division(sites=1))
        site = Path(scratch) / "sites/site-1"
        store = BagStore.open(site, size)
        paths = sorted((site / "images").iterdir())

        def read_cached() -> list[Tensor]:
            return [to_tensor(store[index].images) for index in range(len(store))]

        def decode() -> list[Tensor]:
            pixels = np.stack([image.pixels for image in decode_all(paths, size)])
            return [to_tensor(bag) for bag in np.array_split(pixels, len(store))]

        # A ratio means nothing unless both ways give the same images. Bags may hold them in another order.
        both = [
            sorted(image.numpy().tobytes() for bag in way() for image in bag) for way in (read_cached, decode)
        ]
        assert both[0] == both[1], "the two ways differ"
        decode_seconds, cached_seconds = best(decode), best(read_cached)
    return {
        "case": name,
        "images": number,
        "decode_seconds": round(decode_seconds, 5),
        "cached_seconds": round(cached_seconds, 5),
        "ratio": round(decode_seconds / cached_seconds, 1),
    }


def main() -> None:
    """Print the cases, with the smallest of their ratios as ``ratio`` in JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    cases = [
        measure("PNG of 48 x 48 pixels", 960, 48, 48, ".png", 48),
        measure("JPEG of 600 x 450 pixels, read at 64", 160, 600, 450, ".jpg", 64),
    ]
    if as_json:
        worst = min(cases, key=lambda case: float(str(case["ratio"])))
        print(json.dumps({**worst, "cases": cases}, indent=2))
        return
    for case in cases:
        print(
            f"{case['case']}: decoding {case['decode_seconds']} s, cached {case['cached_seconds']} s, "
            f"ratio {case['ratio']}"
        )


if __name__ == "__main__":
    main()
