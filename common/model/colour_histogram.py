"""Map images to fixed features that count colours in the centre and around it.

Nothing in it is learned, so it costs no privacy and takes no noise: with little private data, linear heads
on fixed features beat networks that are trained end to end (Tramer & Boneh 2021). It is meant for images
whose classes differ in colour and whose object lies in the centre, such as stained cells. It is blind to
shapes.
"""

import torch
from torch import Tensor, nn

from common.parts import Kind, Part

_BINS = 4
"""Along each of red, green and blue: 64 colours."""
_RINGS = 2
"""Pixels nearer to the centre than half the way to an edge, and the rest."""


class ColourHistogram(nn.Module):
    """Map images (N, 3, S, S) in [-1, 1] to features (N, 128) whose mean square is 1.

    Per ring a joint histogram of the three colours, bins filled linearly so that a small change of light
    is a small change of the feature. Square roots make distances those of Hellinger, in which rare
    colours count too, and make the length the same for every image.
    """

    n_features = _RINGS * _BINS**3

    def __init__(self, image_size: int) -> None:
        super().__init__()
        axis = (torch.arange(image_size) + 0.5) * (2 / image_size) - 1
        outer = (axis[:, None].square() + axis.square()).flatten().sqrt() >= 1 / _RINGS
        members = torch.stack([~outer, outer]).float()
        # Tables that the architecture fixes, like the index tables of the label tree: not in its files.
        self.register_buffer("rings", members / members.sum(dim=1, keepdim=True), persistent=False)
        self.register_buffer("centres", torch.linspace(-1, 1, _BINS), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the images."""
        distance = (images.clamp(-1, 1).flatten(2).unsqueeze(2) - self.get_buffer("centres")[:, None]).abs()
        red, green, blue = (1 - distance * (_BINS - 1) / 2).clamp_min(0).unbind(1)
        # (N, _BINS, P) each; the share of a colour in a ring is a mean over pixels of the product.
        pairs = (red[:, :, None] * green[:, None]).flatten(1, 2)
        weighted = torch.einsum("nbp,rp->nrbp", blue, self.get_buffer("rings"))
        shares = torch.einsum("nap,nrbp->nrab", pairs, weighted)
        return (shares * _BINS**3).clamp_min(0).sqrt().flatten(1)


PART = Part(Kind.BACKBONE, "colour-histogram", ColourHistogram, "our own features, Apache-2.0")
