"""Map images to fixed features that describe texture: statistics of the responses of a Gabor bank.

The bank is analytic and nothing in it is learned, so it costs no privacy. Beside a colour histogram it sees
what that is blind to: edges, grain and their direction.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.parts import Kind, Part

_SIDE = 48
"""Pixels that every image is brought to, so that a wavelength is a share of the image."""
_WAVELENGTHS = (4.0, 8.0)
_ORIENTATIONS = 4
_RINGS = 2
_OPPONENT = ((0.299, 0.587, 0.114), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
"""Of red, green and blue: luminance, red against green, yellow against blue."""
_FLOOR = 0.05
"""Of an energy before its logarithm: the grain of a camera, below which nothing is told apart."""


def gabor_pair(wavelength: float, angle: float) -> Tensor:
    """Return an even and an odd Gabor filter of mean 0 and norm 1, shape (2, k, k) with k odd.

    Args:
        wavelength: of the wave, pixels; the envelope's standard deviation is half of it.
        angle: of the wave's direction, radians.
    """
    spread = wavelength / 2
    reach = int(2 * spread)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    down, across = torch.meshgrid(axis, axis, indexing="ij")
    along = across * math.cos(angle) + down * math.sin(angle)
    envelope = torch.exp(-(across.square() + down.square()) / (2 * spread**2))
    filters = []
    for wave in (torch.cos, torch.sin):
        plain = envelope * wave(2 * math.pi * along / wavelength)
        # Without its mean a filter does not answer to brightness.
        centred = plain - envelope * (plain.sum() / envelope.sum())
        filters.append(centred / centred.norm())
    return torch.stack(filters).float()


class Gabor(nn.Module):
    """Map images (N, 3, S, S) in [-1, 1] to features (N, 96).

    For each wavelength, orientation and opponent colour, the mean and the standard deviation of the energy
    of an even and an odd filter within the inner and the outer ring, as logarithms.
    """

    n_features = len(_WAVELENGTHS) * _ORIENTATIONS * 2 * len(_OPPONENT) * _RINGS

    def __init__(self, image_size: int) -> None:
        super().__init__()
        axis = (torch.arange(_SIDE) + 0.5) * (2 / _SIDE) - 1
        outer = (axis[:, None].square() + axis.square()).flatten().sqrt() >= 1 / _RINGS
        members = torch.stack([~outer, outer]).float()
        self.register_buffer("rings", members / members.sum(dim=1, keepdim=True), persistent=False)
        self.register_buffer("opponent", torch.tensor(_OPPONENT), persistent=False)
        for place, wavelength in enumerate(_WAVELENGTHS):
            angles = [math.pi * turn / _ORIENTATIONS for turn in range(_ORIENTATIONS)]
            bank = torch.cat([gabor_pair(wavelength, angle) for angle in angles])
            self.register_buffer(f"bank_{place}", bank[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the images."""
        if images.shape[-1] != _SIDE:
            images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        channels = torch.einsum("oc,nchw->nohw", self.get_buffer("opponent"), images).flatten(0, 1)
        rings = self.get_buffer("rings")
        found = []
        for place in range(len(_WAVELENGTHS)):
            bank = self.get_buffer(f"bank_{place}")
            padded = F.pad(channels[:, None], [bank.shape[-1] // 2] * 4, mode="reflect")
            answers = F.conv2d(padded, bank)
            even, odd = answers[:, 0::2], answers[:, 1::2]
            energy = (even.square() + odd.square() + 1e-6).sqrt().flatten(2)
            mean = energy @ rings.T
            spread = (energy.square() @ rings.T - mean.square()).clamp_min(0).sqrt()
            # (N * colours, orientations, rings) each.
            found.append(torch.stack([mean, spread], dim=2))
        energies = torch.stack(found, dim=1).reshape(len(images), self.n_features)
        return (energies + _FLOOR).log()


PART = Part(
    Kind.BACKBONE, "gabor", Gabor, "fixed form of the Gabor branch of Zhu et al., ICCV 2023; our own code"
)
