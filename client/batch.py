"""Combine bags into the tensors that one optimiser step reads.

Knows nothing of losses, models or labels of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.augment import augment_images
from client.bags import BagStore, to_tensor
from common.config_tables import Augmentation


@dataclass(frozen=True)
class Batch:
    """Hold several bags as one tensor."""

    images: Tensor
    """Shape (N, 3, S, S) in [-1, 1]; the images of a bag are consecutive."""
    bag_index: Tensor
    """Shape (N,) int64: the bag of each image, 0..B-1."""
    level_counts: list[Tensor]
    """Per level shape (B, C_l), float32."""
    bags: Tensor
    """Shape (B,) int64: the position of each bag in the site's store."""

    def __len__(self) -> int:
        """Return B, the number of bags."""
        return len(self.bags)

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        if device.type == "cpu":
            return self
        counts = [count.to(device) for count in self.level_counts]
        return Batch(self.images.to(device), self.bag_index.to(device), counts, self.bags.to(device))

    def augmented(self, augmentation: Augmentation, generator: torch.Generator) -> "Batch":
        """Return the same bags with changed images (see ``augment_images``)."""
        images = augment_images(self.images, self.bag_index, len(self), augmentation, generator)
        return replace(self, images=images)


def make_batch(store: BagStore, bags: NDArray[np.int64]) -> Batch:
    """Combine bags of the store, given by their positions in it, into one batch."""
    chosen = [store[int(bag)] for bag in bags]
    counts = store.hierarchy.roll_up(np.stack([bag.counts for bag in chosen]))
    sizes = torch.tensor([len(bag.images) for bag in chosen])
    return Batch(
        to_tensor(np.concatenate([bag.images for bag in chosen])),
        torch.repeat_interleave(torch.arange(len(chosen)), sizes),
        [torch.from_numpy(level).float() for level in counts],
        torch.from_numpy(np.asarray(bags, dtype=np.int64)),
    )


def chunks(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Yield consecutive pieces of at most ``size`` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
