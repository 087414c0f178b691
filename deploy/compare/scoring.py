"""Score one trained model on labelled test images, at each level by its most accurate reading.

Methods differ in which of their outputs is accurate. A method that learns at the leaf alone is best read at
coarse levels from the summed probabilities of the leaves, another from its own coarse heads. To compare
methods and not decoders, each level is scored by the reading with the highest accuracy, and the row names
that reading.
"""

from pathlib import Path
from typing import Any

import torch

from client.data.labelled import LabelledImages
from client.evaluation import confusion_counts, read_predictions
from client.training import choose_device
from common.config import RunConfig
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import load_model
from deploy.compare.table import FIGURES
from server.evaluation import Confusion, level_figures


def prepare(config: RunConfig) -> torch.device:
    """Limit this process to the threads of the configuration, and return the device that it works on."""
    torch.set_num_threads(config.train.threads)
    return choose_device(config.train.device)


def gpu_memory(device: torch.device) -> float | None:
    """Return the largest amount of GPU memory that this process has held at once, in MB, or None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else None


def score(run: Path, tests: Path, config: RunConfig, device: torch.device) -> list[dict[str, Any]]:
    """Return the scores of a finished run's model per level, coarse to fine.

    Args:
        run: the run folder.
        tests: the folder of the test images.
        config: of the run.
        device: where the model runs.
    """
    model, test = read_model_and_tests(run, tests, config)
    predicted = read_predictions(model, test, device)
    readings = {reading: confusion_counts(classes, test) for reading, classes in predicted.items()}
    return _best_readings(test.hierarchy, readings)


def read_model_and_tests(
    run: Path, tests: Path, config: RunConfig
) -> tuple[HierarchicalClassifier, LabelledImages]:
    """Return a finished run's model and the test images at the size of its input."""
    test = LabelledImages.open(tests, config.model.image_size, features=config.model.feature_names)
    # The folder was made with test images.
    assert test is not None
    # The stored model is the one selected on held-back bags, so the test images have no part in the choice.
    return load_model(run)[0], test


def _best_readings(tree: Hierarchy, readings: dict[str, Confusion]) -> list[dict[str, Any]]:
    """Return the scores of each level by the reading that is most accurate there.

    Args:
        tree: the label tree.
        readings: per reading one (C_l, C_l) array of counts per level, rows the true class; of equally
            accurate readings the first is taken.

    Returns:
        Per level ``{"name", "accuracy", "balanced_accuracy", "macro_f1", "reading", "accuracies"}``, the
        last being the accuracy of every reading.
    """
    figures = {reading: level_figures(tree, counts, counts) for reading, counts in readings.items()}
    rows = []
    for level, name in enumerate(tree.levels):
        accuracies = {reading: levels[level].accuracy for reading, levels in figures.items()}
        best = max(accuracies, key=accuracies.__getitem__)
        chosen = {key: getattr(figures[best][level], key) for key in FIGURES}
        rows.append({"name": name, **chosen, "reading": best, "accuracies": accuracies})
    return rows
