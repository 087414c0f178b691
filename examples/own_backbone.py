"""Bring your own backbone: register it as a part, and train with it.

    python examples/own_backbone.py OUT

A backbone maps images (N, 3, S, S) in [-1, 1] to features (N, d) and says d as ``n_features``; all the rest
(blocks, heads, losses, federation, privacy) stays. docs/parts.md has blocks, heads and loss terms, and says
how a part comes to hospitals.
"""

import sys

from torch import Tensor, nn

import fedbags


class Patches(nn.Module):
    """Map every 4 x 4 patch to a vector, mix the patches, and average them."""

    n_features = 32

    def __init__(self) -> None:
        super().__init__()
        # GroupNorm: BatchNorm would mix the images of a bag, and keep statistics of private ones.
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=4, stride=4),
            nn.GELU(),
            nn.GroupNorm(4, 32),
            nn.Conv2d(32, 32, kernel_size=3, padding=1, groups=32),
            nn.GELU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        mixed: Tensor = self.layers(images)
        return mixed.mean(dim=(2, 3))


def _build(image_size: int) -> Patches:
    return Patches()


def main(out: str) -> None:
    """Train two small hospitals with the backbone, and print what the summary says of it."""
    fedbags.register_part(fedbags.Part(fedbags.Kind.BACKBONE, "patches", _build, "our own; Apache-2.0"))
    settings = {"rounds": 2, "federation.sites": 2, "model.image-size": 24, "model.backbone": "patches"}
    # In this process (workers=0), where the part is registered; a package of parts is found by all.
    run = fedbags.simulate(out, settings=settings, workers=0)
    part = run.summary["parts"][0]
    print(f"{part['kind']} {part['name']} of {part['package']}, source {part['sha256'][:12]}")
    print(f"leaf accuracy {run.summary['levels'][-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
