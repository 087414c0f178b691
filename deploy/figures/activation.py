"""Draw where in a test image a model finds the predicted leaf, as the chosen explainer tells it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from client.data.images import to_tensor
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, consistent_prediction, log_probabilities
from common.model.interfaces import Inputs
from deploy.explain import GRAD_CAM, Explanation, Reason, explain
from deploy.figures.finished_run import FinishedRun, labels, title
from deploy.figures.samples import TestSample
from deploy.figures.style import PALETTE, bare, new_figure, wrapped

_MOST_IMAGES = 6


@dataclass(frozen=True)
class Activation:
    """Hold the prediction of one model for N images, and what led to it.

    Attributes:
        explanation: of the predicted leaves, by the explainer of this name.
        explainer: a part of this kind.
        leaves: shape (N,) predicted leaf, the end of the best path.
        probabilities: shape (N,) the leaf's probability among the leaves.
    """

    explanation: Explanation
    explainer: str
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
    name = activations[0].explainer
    maps = "Class-activation maps" if name == GRAD_CAM else name
    what = title(f"{maps}: where the predicted leaf is seen", runs)
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
            shown = seen.explanation.maps[column].numpy()
            axes.imshow(_overlay(sample.images[column], shown), interpolation="bicubic")
            if seen.explanation.reasons is not None:
                _mark(axes, seen.explanation.reasons[column], len(shown))
            name = wrapped(tree.classes[-1][leaf], 24)
            mark, colour = ("✓", PALETTE[2]) if leaf == true else ("✗", PALETTE[1])
            axes.set_title(f"{mark} {seen.probabilities[column]:.2f}\n{name}", fontsize=8, color=colour)
    return figure


def choose_images(sample: TestSample, tree: Hierarchy, seed: int) -> TestSample:
    """Return up to ``_MOST_IMAGES`` images, one per coarse class in turn and each of another leaf.

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


def activate(
    model: HierarchicalClassifier, images: NDArray[np.uint8], explainer: str = GRAD_CAM
) -> Activation:
    """Return the predictions for images (N, S, S, 3), each alone, and what the explainer tells of them.

    Raises:
        ConfigError: there is no such explainer.
        NoExplanation: the model lacks what it looks at.
    """
    inputs = Inputs.alone(to_tensor(images))
    with torch.no_grad():
        output = model(inputs)
    leaves = consistent_prediction(output, model.hierarchy)[:, -1]
    probabilities = log_probabilities(output)[-1].exp().gather(1, leaves[:, None])[:, 0]
    explanation = explain(explainer, model, inputs, leaves)
    return Activation(explanation, explainer, leaves.numpy(), probabilities.numpy())


def _mark(axes: Axes, reasons: Sequence[Reason], side: int) -> None:
    """Draw a frame with its name around the place of each reason that has one, in an image of this side."""
    for reason in reasons:
        if reason.box is not None:
            left, top, right, bottom = (edge * side - 0.5 for edge in reason.box)
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=PALETTE[0]))
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(left, top, f"{reason.name} {reason.value:.2f}", fontsize=7, bbox=ground)


def _overlay(image: NDArray[np.uint8], seen: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the image (S, S, 3) in grey with the map (S, S) over it, as RGB in [0, 1]."""
    # The weights of red, green and blue in luma (ITU-R BT.601).
    grey = (image.astype(np.float64) @ [0.299, 0.587, 0.114] / 255)[..., None]
    heat = colormaps["inferno"](seen)[..., :3]
    strength = 0.75 * np.clip(seen, 0, 1)[..., None]
    mixed: NDArray[np.float64] = (1 - strength) * grey + strength * heat
    return mixed
