"""Evaluate a model at a site in sums and counts that show no single image."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.bags import BagStore
from client.data.batch import chunks, make_batch
from client.training import choose_device
from common.config import RunConfig
from common.model.classifier import HierarchicalClassifier, consistent_prediction, log_probabilities
from common.model.losses import proportion_kl, proportion_l1
from common.privacy.proportions import to_grid
from common.records import Metric

if TYPE_CHECKING:  # training must not even load the module that opens instance labels
    from client.data.labelled import LabelledImages

_IMAGES_AT_ONCE = 256


@torch.no_grad()
def evaluate_bags(model: HierarchicalClassifier, store: BagStore, config: RunConfig) -> dict[str, Metric]:
    """Return the proportion KL and L1 per level, averaged over the site's held-back bags.

    No label of an image is used.

    Returns:
        ``bags-kl`` and ``bags-l1`` (one number per level) and ``held-back-bags``; empty when the site
        holds no bag back.
    """
    divergences, distances = _compare_bags(model, store, config)
    if not divergences.shape[1]:
        return {}
    return {
        "bags-kl": tuple(divergences.mean(dim=1).tolist()),
        "bags-l1": tuple(distances.mean(dim=1).tolist()),
        "held-back-bags": distances.shape[1],
    }


@torch.no_grad()
def sum_distances(model: HierarchicalClassifier, store: BagStore, config: RunConfig) -> NDArray[np.int64]:
    """Return per level the sum of the held-back bags' total-variation distances, shape (levels,).

    EXACT, in steps of ``common.privacy.proportions.GRID``: must not leave the site without noise.
    """
    _, distances = _compare_bags(model, store, config)
    # Half of L1 is the total-variation distance. Each bag's is rounded on its own, so that one bag moves
    # the sum by at most GRID: that is what the noise is scaled to.
    return np.asarray(to_grid(distances.numpy() / 2).sum(axis=1), dtype=np.int64)


def _compare_bags(
    model: HierarchicalClassifier, store: BagStore, config: RunConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and L1 between true and predicted proportions, each (levels, held-back bags) in float64."""
    device = choose_device(config.train.device)
    model.to(device).eval()
    _, held_back = store.split(config.train.held_back, config.seed)
    empty = torch.zeros(len(store.hierarchy.levels), 0)
    kl, l1 = [empty], [empty]
    for bags in chunks(held_back, max(1, _IMAGES_AT_ONCE // int(store.bag_sizes.max()))):
        batch = make_batch(store, bags).to(device)
        scores = model(batch.inputs).scores
        pairs = list(zip(scores, batch.level_counts, strict=True))
        kl.append(torch.stack([proportion_kl(s, batch.inputs.bag_index, c) for s, c in pairs]).cpu())
        l1.append(torch.stack([proportion_l1(s, batch.inputs.bag_index, c) for s, c in pairs]).cpu())
    return torch.cat(kl, dim=1).double(), torch.cat(l1, dim=1).double()


@torch.no_grad()
def evaluate_labelled(
    model: HierarchicalClassifier, test: "LabelledImages", config: RunConfig
) -> dict[str, Metric]:
    """Count predictions against labels per level, by argmax of each level and by best root-to-leaf path.

    Returns:
        ``confusion.argmax.LEVEL`` and ``confusion.path.LEVEL``: C_l * C_l counts, row by row, rows the
        true class.
    """
    predicted = read_predictions(model, test, choose_device(config.train.device))
    metrics: dict[str, Metric] = {}
    for reading in ("argmax", "path"):
        for level, counts in enumerate(confusion_counts(predicted[reading], test)):
            metrics[f"confusion.{reading}.{level}"] = tuple(counts.flatten().tolist())
    return metrics


@torch.no_grad()
def read_predictions(
    model: HierarchicalClassifier, test: "LabelledImages", device: torch.device
) -> dict[str, torch.Tensor]:
    """Predict the class of every image at every level, each image alone, in each way that the model allows.

    Args:
        model: is moved to the device and put into evaluation mode.
        test: N images, or fixed features of them.
        device: where the model runs.

    Returns:
        Shape (N, L) int64 by reading: ``argmax`` (each level by itself), ``path`` (the best root-to-leaf
        path) and ``rolled-up`` (each level by the leaves' probabilities, summed up the tree).
    """
    model.to(device).eval()
    tree = model.hierarchy
    readings: dict[str, list[torch.Tensor]] = {"argmax": [], "path": [], "rolled-up": []}
    for rows in chunks(np.arange(len(test.labels)), _IMAGES_AT_ONCE):
        output = model(test.inputs(slice(rows[0], rows[-1] + 1)).to(device))
        levels = log_probabilities(output)
        readings["argmax"].append(torch.stack([level.argmax(1) for level in levels], dim=1).cpu())
        readings["path"].append(consistent_prediction(output, tree).cpu())
        summed = tree.roll_up(levels[-1].exp().cpu().double().numpy())
        rolled = np.stack([level.argmax(axis=1) for level in summed], axis=1)
        readings["rolled-up"].append(torch.from_numpy(rolled))
    return {reading: torch.cat(parts) for reading, parts in readings.items()}


def confusion_counts(predicted: torch.Tensor, test: "LabelledImages") -> list[NDArray[np.int64]]:
    """Return per level the counts of true against predicted class, shape (C_l, C_l), rows the true class.

    Args:
        predicted: classes, shape (N, L).
        test: the images' labels and hierarchy.
    """
    truth = torch.from_numpy(test.hierarchy.paths[test.labels])
    counts = []
    for level, size in enumerate(test.hierarchy.sizes):
        pairs = truth[:, level] * size + predicted[:, level]
        counts.append(torch.bincount(pairs, minlength=size * size).numpy().reshape(size, size))
    return counts
