"""Per-bag augmentation: label-preserving changes of the images, none of the counts."""

import torch
from torch import Tensor

JITTER = 0.1
"""Largest relative change of a bag's brightness and of its contrast."""


def augment_bag(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, turn and shift each image at random; change brightness and contrast of the bag as one.

    Light and staining differ between sessions rather than between the images of one bag, hence one
    draw per bag for them.

    Args:
        images: shape (m, 3, S, S), float in [-1, 1]; not changed.
        generator: on the CPU; its state fixes the result.

    Returns:
        A new tensor of the same shape and dtype. The eight flips and quarter turns are equally
        likely; shifts are up to S // 12 pixels, borders reflected.
    """
    number, _, size, _ = images.shape
    device = images.device
    reach = size // 12
    shifts = torch.randint(-reach, reach + 1, (2, number, 1), generator=generator)
    flips = torch.rand((2, number, 1), generator=generator) < 0.5
    transposed = torch.rand((number, 1, 1, 1), generator=generator) < 0.5
    jitter = 1 + JITTER * (2 * torch.rand(2, generator=generator) - 1)

    index = torch.arange(size) + shifts
    index = index.abs()  # reflects below 0, and the next line beyond the last pixel
    index = torch.where(index >= size, 2 * (size - 1) - index, index)
    rows, columns = torch.where(flips, index.flip(-1), index).to(device)
    image = torch.arange(number, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=device).view(1, -1, 1, 1)
    moved = images[image, channel, rows.view(number, 1, size, 1), columns.view(number, 1, 1, size)]
    moved = torch.where(transposed.to(device), moved.transpose(2, 3), moved)

    brightness, contrast = jitter.tolist()
    mean = moved.mean()
    # x -> brightness * (mean + contrast * (x - mean)), brightness on the scale where black is 0.
    return moved.mul_(contrast * brightness).add_(((1 - contrast) * mean + 1) * brightness - 1)
