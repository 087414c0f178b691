"""Draw class-activation maps, which mark where in a test image a model finds the predicted leaf.

The maps are Grad-CAM (Selvaraju et al. 2017) on the last feature map that still has some resolution. They
exist for every backbone that has such a map. A ViT has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from client.data.bags import to_tensor
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, consistent_prediction, log_probabilities
from common.model.interfaces import Inputs
from deploy.figures.finished_run import FinishedRun, labels, title
from deploy.figures.samples import TestSample
from deploy.figures.style import PALETTE, bare, new_figure, wrapped

_MOST_IMAGES = 6


@dataclass(frozen=True)
class Activation:
    """Hold the prediction of one model for N images, with a map of the positions that led to it.

    Attributes:
        maps: shape (N, S, S) in [0, 1], the largest of each image 1 (or all 0).
        leaves: shape (N,) predicted leaf, the end of the best path.
        probabilities: shape (N,) the leaf's probability among the leaves.
    """

    maps: NDArray[np.float32]
    leaves: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def draw_activation(
    runs: Sequence[FinishedRun], samples: Sequence[TestSample], activations: Sequence[Activation]
) -> Figure:
    """Return a figure with one column per image, the image on top and an overlay for every run below.

    Args:
        runs: one row of overlays each.
        samples: each run's images; the same ones, maybe at different sizes.
        activations: from ``activate``, one per run.
    """
    tree = runs[0].tree
    number = len(samples[0].labels)
    what = title("Class-activation maps: where the predicted leaf is seen", runs)
    figure = new_figure(2.15 * number + 0.6, 2.75 * (1 + len(runs)) + 0.5, what)
    grid = figure.subplots(1 + len(runs), number, squeeze=False)
    for axes in grid.flat:
        bare(axes)
    for column, leaf in enumerate(samples[0].labels.tolist()):
        grid[0, column].imshow(samples[0].images[column], interpolation="bicubic")
        grid[0, column].set_title("true:\n" + wrapped(tree.classes[-1][leaf], 24), fontsize=8)
    grid[0, 0].set_ylabel("test image")
    for row, (label, sample, seen) in enumerate(zip(labels(runs), samples, activations, strict=True), 1):
        grid[row, 0].set_ylabel(wrapped(label, 26))
        for column, true in enumerate(sample.labels.tolist()):
            axes, leaf = grid[row, column], int(seen.leaves[column])
            axes.imshow(_overlay(sample.images[column], seen.maps[column]), interpolation="bicubic")
            name = wrapped(tree.classes[-1][leaf], 24)
            mark, colour = ("✓", PALETTE[2]) if leaf == true else ("✗", PALETTE[1])
            axes.set_title(f"{mark} {seen.probabilities[column]:.2f}\n{name}", fontsize=8, color=colour)
    return figure


def choose_images(sample: TestSample, tree: Hierarchy, seed: int) -> TestSample:
    """Return up to MOST_IMAGES images, one per coarse class in turn and each of another leaf.

    The choice is fixed by ``seed``.
    """
    rng = np.random.default_rng(seed)
    coarse = tree.paths[:, 0]
    queues: dict[int, list[int]] = {}
    for leaf in rng.permutation(np.unique(sample.labels)).tolist():
        row = int(rng.choice(np.flatnonzero(sample.labels == leaf)))
        queues.setdefault(int(coarse[leaf]), []).append(row)
    chosen: list[int] = []
    for turn in range(_MOST_IMAGES):
        chosen += [queues[node][turn] for node in sorted(queues) if turn < len(queues[node])]
    chosen = sorted(chosen[:_MOST_IMAGES], key=lambda row: int(sample.labels[row]))
    return TestSample(sample.images[chosen], sample.labels[chosen], sample.sites[chosen])


def activate(model: HierarchicalClassifier, images: NDArray[np.uint8]) -> Activation | None:
    """Return the predictions and maps of images (N, S, S, 3), or None without a feature map."""
    inputs = Inputs.alone(to_tensor(images))
    # The maps need gradients, whatever mode the caller is in.
    with torch.enable_grad():
        output = model(inputs)
    features = output.features.map
    if features is None or not features.requires_grad:
        return None
    leaves = consistent_prediction(output, model.hierarchy)[:, -1]
    # Each image is in a bag of its own, so one sum gives every image's gradient.
    (gradient,) = torch.autograd.grad(output.scores[-1].gather(1, leaves[:, None]).sum(), features)
    features = features.detach()
    # A channel's weight is its mean gradient: single positions would show the grid of strided convolutions.
    seen = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True))
    maps = F.interpolate(seen, inputs.images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    probabilities = log_probabilities(output)[-1].exp().gather(1, leaves[:, None])[:, 0]
    return Activation(maps.numpy(), leaves.numpy(), probabilities.detach().numpy())


def _overlay(image: NDArray[np.uint8], seen: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the image (S, S, 3) in grey with the map (S, S) over it, as RGB in [0, 1]."""
    # The weights of red, green and blue in luma (ITU-R BT.601).
    grey = (image.astype(np.float64) @ [0.299, 0.587, 0.114] / 255)[..., None]
    heat = colormaps["inferno"](seen)[..., :3]
    strength = 0.75 * np.clip(seen, 0, 1)[..., None]
    mixed: NDArray[np.float64] = (1 - strength) * grey + strength * heat
    return mixed
