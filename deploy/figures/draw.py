"""Draw every figure that runs have the data for, one by one, and write it to disk."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from common.errors import UserError
from common.hierarchy import Hierarchy
from common.parts import Kind, part
from deploy.cli.terminal import console, text_column
from deploy.explain import GRAD_CAM, NoExplanation
from deploy.figures.activation import activate, choose_images, draw_activation
from deploy.figures.charts import draw_confusion, draw_curves
from deploy.figures.embedding import MOST_IMAGES, draw_embedding, embed
from deploy.figures.finished_run import FinishedRun, labels, open_runs
from deploy.figures.samples import NoTestImages, TestSample, find_sites, read_sample
from deploy.figures.style import house_style, save

_FOLDER, _SIDE_BY_SIDE = "figures", "side-by-side"


def draw_figures(runs: list[Path], out: Path | None, explainer: str = GRAD_CAM) -> list[Path]:
    """Draw every figure that the runs have the data for.

    A line on standard error names each figure that is left out, with the reason.

    Args:
        runs: one run folder, or several on the same classes to set side by side. The test images are
            those of the first.
        out: folder for the pictures; None: ``figures`` in the run folder, or for several runs
            ``figures/side-by-side`` in the first.
        explainer: whose maps activation.png shows.

    Returns:
        The pictures written.

    Raises:
        UserError: a run is missing, unfinished or damaged, the label trees differ, or a picture cannot
            be written; or there is no such explainer, or what it gives is no explanation.
    """
    if not runs:
        raise UserError("no run given: name one run folder, or several to set side by side")
    opened = open_runs(runs)
    part(Kind.EXPLAINER, explainer)
    if out is None:
        out = runs[0] / _FOLDER if len(runs) == 1 else runs[0] / _FOLDER / _SIDE_BY_SIDE
    # Each is a function, so that one figure is in memory at a time and one without data does not stop the
    # others.
    pictures: dict[str, Callable[[], Figure]] = {"curves.png": partial(draw_curves, opened)}
    for level, name in enumerate(_confusion_names(opened[0].tree)):
        pictures[name] = partial(_confusion, opened, level)
    pictures["tsne.png"] = partial(_embedding, opened)
    pictures["activation.png"] = partial(_activation, opened, explainer)
    terminal = console(stderr=True)
    bar = Progress(
        text_column("drawing {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )
    written = []
    with house_style(), bar:
        task = bar.add_task("", total=len(pictures))
        for name, draw in pictures.items():
            bar.update(task, description=name)
            try:
                written.append(save(draw(), out / name))
            except NoTestImages as reason:
                terminal.print(f"{name} left out: {reason}", soft_wrap=True)
            bar.advance(task)
    return written


def _confusion_names(tree: Hierarchy) -> list[str]:
    """Return a file name per level, without characters that file systems refuse.

    Names that would collide are numbered.
    """
    plain = [re.sub(r"[^\w.-]+", "-", name) for name in tree.levels]
    # Some file systems do not tell upper and lower case apart.
    folded = [name.casefold() for name in plain]
    return [
        f"confusion-{name}.png" if folded.count(name.casefold()) == 1 else f"confusion-{number}-{name}.png"
        for number, name in enumerate(plain, start=1)
    ]


def _confusion(runs: Sequence[FinishedRun], level: int) -> Figure:
    for run in runs:
        if run.confusion is None:
            raise NoTestImages(f"run {run.name} had no labelled test images")
    return draw_confusion(runs, level)


def _embedding(runs: Sequence[FinishedRun]) -> Figure:
    samples = _samples(runs)
    embeddings = [
        embed(run.model, sample, runs[0].config.seed) for run, sample in zip(runs, samples, strict=True)
    ]
    return draw_embedding(runs, samples, embeddings)


def _activation(runs: Sequence[FinishedRun], explainer: str) -> Figure:
    seed = runs[0].config.seed
    samples = [choose_images(sample, runs[0].tree, seed) for sample in _samples(runs)]
    activations = []
    for run, label, sample in zip(runs, labels(runs), samples, strict=True):
        try:
            activations.append(activate(run.model, sample.images, explainer))
        except NoExplanation as reason:
            raise NoTestImages(f"{label}: the backbone {run.config.model.backbone} {reason}") from reason
    return draw_activation(runs, samples, activations)


def _samples(runs: Sequence[FinishedRun]) -> list[TestSample]:
    """Return the first run's test images, at the size of every run's input."""
    folders = find_sites(runs[0])
    return [read_sample(runs[0], folders, run.config.model.image_size, most=MOST_IMAGES) for run in runs]
