"""Combine bags into the tensors that one optimiser step reads, and change their images at random.

Knows nothing of losses, models or labels of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.bags import Bags
from client.data.images import to_tensor
from common.config_tables import Augmentation
from common.model.interfaces import Inputs
from common.model.losses import bag_means

_JITTER = 0.1
"""Largest relative change of a bag's brightness and of its contrast."""


def _augment_images(
    images: Tensor, bag_index: Tensor, n_bags: int, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """Flip, turn and shift each image at random, and change brightness and contrast of each bag as one.

    Light and staining differ between sessions rather than between the images of one bag, hence one
    draw per bag for them.

    Args:
        images: shape (N, 3, S, S), float in [-1, 1]; not changed.
        bag_index: shape (N,), int64 in [0, n_bags), every bag at least once.
        n_bags: B.
        augmentation: what is done; ``none`` gives the images back.
        generator: on the CPU; its state fixes the result. The numbers of one bag depend on the whole batch:
            a bag whose numbers must be its own comes in a batch by itself, with a generator of its own.

    Returns:
        A new tensor of the same shape and dtype. The eight flips and quarter turns are equally
        likely; shifts are up to S // 12 pixels, borders reflected.
    """
    if augmentation is Augmentation.NONE:
        return images
    number, _, size, _ = images.shape
    device = images.device
    reach = size // 12
    # Flips and shifts only change indices, so that the pixels are copied once for both.
    index = torch.arange(size) + torch.randint(-reach, reach + 1, (2, number, 1), generator=generator)
    index = index.abs()  # reflects below 0, and the next line beyond the last pixel
    index = torch.where(index >= size, 2 * (size - 1) - index, index)
    transposed = None
    if augmentation is Augmentation.FULL:
        flips = torch.rand((2, number, 1), generator=generator) < 0.5
        transposed = torch.rand((number, 1, 1, 1), generator=generator) < 0.5
        index = torch.where(flips, index.flip(-1), index)
    light = 1 + _JITTER * (2 * torch.rand((n_bags, 2), generator=generator) - 1)

    rows, columns = index.to(device)
    image = torch.arange(number, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=device).view(1, -1, 1, 1)
    moved = images[image, channel, rows.view(number, 1, size, 1), columns.view(number, 1, 1, size)]
    if transposed is not None:
        moved = torch.where(transposed.to(device), moved.transpose(2, 3), moved)

    brightness, contrast = light.to(device, moved.dtype)[bag_index].T
    mean = bag_means(moved.mean(dim=(1, 2, 3)), bag_index, n_bags).to(moved.dtype)[bag_index]
    # x -> brightness * (mean + contrast * (x - mean)), brightness on the scale where black is 0.
    factor, offset = contrast * brightness, ((1 - contrast) * mean + 1) * brightness - 1
    return moved.mul_(factor.view(-1, 1, 1, 1)).add_(offset.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class Batch:
    """Hold several bags as one tensor."""

    inputs: Inputs
    """What the model looks at: N images in bags 0..B-1."""
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
        return Batch(self.inputs.to(device), counts, self.bags.to(device))

    def augmented(self, augmentation: Augmentation, generator: torch.Generator) -> "Batch":
        """Return the same bags with changed images (see ``_augment_images``); fixed features stay."""
        inputs = self.inputs
        if inputs.features is not None:
            return self
        images = _augment_images(inputs.images, inputs.bag_index, len(self), augmentation, generator)
        return replace(self, inputs=inputs.with_images(images))


def make_batch(store: Bags, bags: NDArray[np.int64]) -> Batch:
    """Combine bags of the store, given by their positions in it, into one batch.

    Where the store has fixed features they stand for the images, which are not touched.
    """
    chosen = [store[int(bag)] for bag in bags]
    counts = store.hierarchy.roll_up(np.stack([bag.counts for bag in chosen]))
    sizes = torch.tensor([len(bag.images) for bag in chosen])
    bag_index = torch.repeat_interleave(torch.arange(len(chosen)), sizes)
    features = [bag.features for bag in chosen if bag.features is not None]
    return Batch(
        Inputs.of_features(torch.from_numpy(np.concatenate(features)), bag_index)
        if features
        else Inputs(to_tensor(np.concatenate([bag.images for bag in chosen])), bag_index),
        [torch.from_numpy(level).float() for level in counts],
        torch.from_numpy(np.asarray(bags, dtype=np.int64)),
    )


def chunks(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Yield consecutive pieces of at most ``size`` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
