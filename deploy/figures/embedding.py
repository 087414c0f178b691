"""Draw t-SNE of test images and of bags of them, coloured by the two coarsest levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier
from deploy.compare.probes import pooled_features
from deploy.figures.charts import tree_order
from deploy.figures.finished_run import FinishedRun, labels, title
from deploy.figures.samples import TestSample
from deploy.figures.style import bare, class_styles, new_figure

MOST_IMAGES = 1500
_BAG_SIZE = 16
_COMPONENTS = 30
"""Principal components that t-SNE starts from; more cost time and change little."""
_ITERATIONS = 500
_MOST_IN_LEGEND = 30


@dataclass(frozen=True)
class Embedding:
    """Hold the places of images and bags on one plane.

    Attributes:
        images: shape (N, 2).
        bags: shape (B, 2), each bag's mean feature.
        members: the images of each bag, as rows of ``images``.
    """

    images: NDArray[np.float64]
    bags: NDArray[np.float64]
    members: list[NDArray[np.int64]]


def draw_embedding(
    runs: Sequence[FinishedRun], samples: Sequence[TestSample], embeddings: Sequence[Embedding]
) -> Figure:
    """Return a figure of images as small points and of the mean features of bags as stars.

    A star has the colour of the commonest class of its bag.

    Args:
        runs: one column each.
        samples: each run's test images; the same images, maybe at different sizes.
        embeddings: from ``embed``, one per run.
    """
    tree = runs[0].tree
    levels = range(min(2, len(tree.levels)))
    side = 5.2
    across = len(runs) == 1
    rows, columns = (1, len(levels)) if across else (len(levels), len(runs))
    what = f"t-SNE of {len(samples[0].labels)} test images and {len(embeddings[0].bags)} bags of them"
    figure = new_figure(side * columns + 2.2, side * rows + 0.6, title(what, runs))
    grid = figure.subplots(rows, columns, squeeze=False)
    for level in levels:
        for number, (sample, embedding) in enumerate(zip(samples, embeddings, strict=True)):
            axes = grid[0, level] if across else grid[level, number]
            _draw_points(axes, tree, level, sample, embedding)
            if across:
                axes.set_title(f"coloured by {tree.levels[level]}")
            elif level == 0:
                axes.set_title(labels(runs)[number])
            if not across and number == 0:
                axes.set_ylabel(f"coloured by {tree.levels[level]}")
        handles = _legend(tree, level)
        if across:
            # Below its panel, where a long list of classes squeezes nothing.
            grid[0, level].legend(
                handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8
            )
        else:
            grid[level, -1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def embed(model: HierarchicalClassifier, sample: TestSample, seed: int) -> Embedding:
    """Place the images' features, and the mean features of bags of them, on one plane."""
    features: NDArray[np.float32] = pooled_features(model, sample.images, torch.device("cpu")).numpy()
    bags = _draw_bags(sample, model.hierarchy, seed)
    means = np.stack([features[bag].mean(axis=0) for bag in bags])
    together = np.concatenate([features, means])
    components = min(_COMPONENTS, *together.shape)
    reduced = PCA(components, random_state=seed).fit_transform(together)
    # t-SNE requires a perplexity, its effective number of neighbours, below the number of points.
    perplexity = min(30.0, (len(together) - 1) / 3)
    # Initialised from the principal components and with a fixed seed, so that a figure can be drawn again.
    tsne = TSNE(perplexity=perplexity, init="pca", max_iter=_ITERATIONS, random_state=seed)
    plane = tsne.fit_transform(reduced).astype(np.float64)
    return Embedding(plane[: len(features)], plane[len(features) :], bags)


def _draw_bags(sample: TestSample, tree: Hierarchy, seed: int) -> list[NDArray[np.int64]]:
    """Group each site's images into bags of about ``_BAG_SIZE`` with uneven class mixes, fixed by ``seed``.

    Half of a bag are neighbours in the tree, the other half are drawn from the whole site. Bags drawn at
    random alone would all have nearly the same mix, and their means would fall on one spot.
    """
    rng = np.random.default_rng(seed)
    place = np.argsort(tree_order(tree, len(tree.levels) - 1))
    bags = []
    for site in np.unique(sample.sites):
        rows = rng.permutation(np.flatnonzero(sample.sites == site))
        number = max(1, round(len(rows) / _BAG_SIZE))
        near, anywhere = np.array_split(rows, 2)
        near = near[np.argsort(place[sample.labels[near]], kind="stable")]
        halves = zip(np.array_split(near, number), np.array_split(anywhere, number), strict=True)
        bags += [np.concatenate(pair) for pair in halves]
    return bags


def _majority(classes: NDArray[np.int64], bags: Sequence[NDArray[np.int64]]) -> list[int]:
    """Return the commonest class of each bag, and the first of them on a tie."""
    return [int(np.bincount(classes[bag]).argmax()) for bag in bags]


def _draw_points(axes: Axes, tree: Hierarchy, level: int, sample: TestSample, embedding: Embedding) -> None:
    classes = tree.paths[sample.labels, level]
    styles = class_styles(tree, level)
    for node in np.unique(classes):
        points = embedding.images[classes == node]
        style = styles[node]
        axes.scatter(
            points[:, 0], points[:, 1], s=11, c=style.colour, marker=style.marker, alpha=0.55, linewidths=0
        )
    commonest = _majority(classes, embedding.members)
    colours = [styles[node].colour for node in commonest]
    x, y = embedding.bags.T
    axes.scatter(x, y, s=75, c=colours, marker="*", edgecolors="black", linewidths=0.6)
    bare(axes)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#CCCCCC")


def _legend(tree: Hierarchy, level: int) -> list[Line2D]:
    star = Line2D(
        [],
        [],
        linestyle="",
        marker="*",
        color="white",
        markeredgecolor="black",
        markersize=10,
        label="bag (its commonest class)",
    )
    shown = level if tree.sizes[level] <= _MOST_IN_LEGEND else 0
    if tree.sizes[shown] > _MOST_IN_LEGEND:
        return [star]
    return [
        Line2D([], [], linestyle="", marker=style.marker, color=style.colour, markersize=6, label=name)
        for style, name in zip(class_styles(tree, shown), tree.classes[shown], strict=True)
    ] + [star]
