"""Compute the fixed features of decoded images once, and keep them beside the images.

They are a function of an image alone, so a run of any length computes them once per image and data version.
The cache is mapped like that of the images, and built anew when the images, the list of features or their
statistics change.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.images import CacheKey, Progress, opened, to_tensor, write_header
from common.model.features.bank import FeatureBank

_AT_ONCE = 64
"""Images of one piece of work."""


def open_features(
    folder: Path,
    key: CacheKey,
    images: NDArray[np.uint8],
    bank: FeatureBank,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Map the features of these images, shape (N, F), computing them first where there are none.

    Args:
        folder: where caches live.
        key: of the cache of the images.
        images: shape (N, S, S, 3).
        bank: what to compute.
        progress: called with (images done, images in all) while computing.

    Raises:
        UserError: the folder cannot be written, or the disk is full; no partial cache is left.
    """

    def fill(temporary: Path) -> None:
        with (temporary / "features.npy").open("wb") as stream:
            write_header(stream, "<f4", (len(images), bank.n_features))
            for done, rows in enumerate(_computed(images, bank), start=1):
                stream.write(rows.tobytes())
                if progress is not None:
                    progress(min(done * _AT_ONCE, len(images)), len(images))
        (temporary / "cache.json").write_text("{}", encoding="utf-8")

    def read(target: Path) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.load(target / "features.npy", mmap_mode="r")
        return found

    own = CacheKey(f"{key.kind}_features", key.version, key.image_size, bank.key)
    return opened(folder, own, 4 * len(images) * bank.n_features, fill, read)


def _computed(images: NDArray[np.uint8], bank: FeatureBank) -> Iterator[NDArray[np.float32]]:
    """Yield the features of one piece after the other, several computed at a time."""

    def compute(start: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = bank(to_tensor(images[start : start + _AT_ONCE])).numpy()
        return found

    threads, processors = torch.get_num_threads(), os.cpu_count() or 1
    # One thread a piece, since the last bits of a feature depend on their number.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(processors) as pool:
            starts = range(0, len(images), _AT_ONCE)
            for first in range(0, len(starts), processors):
                yield from pool.map(compute, starts[first : first + processors])
    finally:
        torch.set_num_threads(threads)
