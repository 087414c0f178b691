"""Draw the curves of training and the confusion matrices that a run's files hold.

Curves are the sites' training loss and the errors on held-back bags, round by round. Confusion matrices are
of the pooled test images, one figure per level, with siblings side by side.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from common.hierarchy import Hierarchy
from common.run_records import BagsEvaluated, RoundDone, UpdateTaken
from deploy.figures.finished_run import FinishedRun, labels, title
from deploy.figures.style import GREY, LINES, PALETTE, bare, new_figure, wrapped
from deploy.runs.show import bounds_of, share_text, suppression

_MOST_SITES_NAMED = 10

_MOST_NUMBERED = 12
"""Classes up to which every cell tells its share in figures."""
_MOST_NAMED = 60
"""Classes up to which each has its name on the axes; above, only their parents have."""


def draw_curves(runs: Sequence[FinishedRun]) -> Figure:
    """Return a figure of the training loss and of the KL and L1 of held-back bags per level.

    Several runs are drawn over one another.
    """
    figure = new_figure(14, 5.4, title("Training curves", runs))
    figure.set_layout_engine("constrained", w_pad=0.12)
    loss, kl, l1 = figure.subplots(1, 3)
    _draw_loss(loss, runs)
    _draw_bags(kl, runs, "kl", "KL divergence of held-back bags", "nats")
    _draw_bags(l1, runs, "l1", "L1 distance of held-back bags", "sum of |difference of proportions|")
    return figure


def _draw_loss(axes: Axes, runs: Sequence[FinishedRun]) -> None:
    # Methods minimise different losses, whose values cannot be compared.
    axes.set_title("Training loss" if len(runs) == 1 else "Training loss (of each method's own kind)")
    axes.set_ylabel("loss (nats)")
    handles: list[Line2D] = []
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        colour = "black" if len(runs) == 1 else PALETTE[number % len(PALETTE)]
        name = "mean of sites" if len(runs) == 1 else label
        means = {event.round: event.loss for event in run.of(RoundDone) if event.loss is not None}
        for place, site in enumerate(sites := sorted({event.site for event in run.of(UpdateTaken)})):
            taken = [event for event in run.of(UpdateTaken) if event.site == site]
            losses = [(event.round, event.loss) for event in taken if event.loss is not None]
            named = len(runs) == 1 and len(sites) <= _MOST_SITES_NAMED
            line = Line2D(
                [round for round, _ in losses],
                [loss for _, loss in losses],
                color=PALETTE[place % len(PALETTE)] if named else colour,
                linestyle=LINES[place // len(PALETTE)] if named else "-",
                linewidth=1.0,
                alpha=0.8 if named else 0.25,
                label=site,
            )
            axes.add_line(line)
            handles += [line] if named else []
        handles += axes.plot(
            list(means),
            list(means.values()),
            color=colour,
            linewidth=2.2,
            marker="o" if len(means) == 1 else "",
            label=name,
        )
    axes.autoscale_view()
    # A site's policy may withhold its training loss.
    if not any(event.loss is not None for run in runs for event in run.of(RoundDone)):
        _draw_note(axes, "the sites sent no training loss")
        return
    _count_rounds(axes)
    _legend_below(axes, handles)


def _draw_bags(axes: Axes, runs: Sequence[FinishedRun], key: str, heading: str, unit: str) -> None:
    axes.set_title(heading)
    axes.set_ylabel(unit)
    several, shown = len(runs) > 1, False
    handles: list[Line2D] = []
    for number, run in enumerate(runs):
        # Sites may withhold these figures, and a curve needs them at every level.
        events = [
            event
            for event in run.of(BagsEvaluated)
            if all(getattr(level, key) is not None for level in event.levels)
        ]
        rounds = [event.round for event in events]
        shown = shown or bool(rounds)
        for level, name in enumerate(run.tree.levels):
            values = [getattr(event.levels[level], key) for event in events]
            colour = PALETTE[(number if several else level) % len(PALETTE)]
            line = LINES[level % len(LINES)] if several else "-"
            (drawn,) = axes.plot(rounds, values, color=colour, linestyle=line, linewidth=1.8, label=name)
            handles += [] if several else [drawn]
            if run.selected_round in rounds:
                kept = values[rounds.index(run.selected_round)]
                axes.plot(
                    [run.selected_round],
                    [kept],
                    "*",
                    color=colour,
                    markersize=12,
                    markeredgecolor="white",
                    zorder=3,
                    clip_on=False,  # a star at the upper edge would be cut in half
                )
    if not shown:
        kept = any(run.of(BagsEvaluated) for run in runs)
        _draw_note(axes, "withheld by the sites" if kept else "no figures of held-back bags")
        return
    _count_rounds(axes)
    axes.set_ylim(bottom=0)
    if several:
        handles += [
            Line2D([], [], color=GREY, linestyle=LINES[level % len(LINES)], label=name)
            for level, name in enumerate(runs[0].tree.levels)
        ]
    handles.append(
        Line2D([], [], color=GREY, linestyle="", marker="*", markersize=10, label="selected round")
    )
    if several:
        handles += [
            Line2D([], [], color=PALETTE[number % len(PALETTE)], linewidth=1.8, label=label)
            for number, label in enumerate(labels(runs))
        ]
    _legend_below(axes, handles)


def _legend_below(axes: Axes, handles: list[Line2D]) -> None:
    """Place the legend under the panel, where it covers no curve."""
    columns = 2 if any(len(str(handle.get_label())) > 16 for handle in handles) else 3
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize=8)


def _count_rounds(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_note(axes: Axes, text: str) -> None:
    """Draw an empty panel with a text that says why it is empty."""
    bare(axes)
    axes.set_ylabel("")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def draw_confusion(runs: Sequence[FinishedRun], level: int) -> Figure:
    """Return the confusion matrices of one level.

    For one run the level's own best class stands next to the best path. For several runs the best class is
    shown for each. Rows are true classes, and each is divided by its sum. The rows of classes without test
    images stay empty. Classes stand in the order of the tree, with lines between the children of different
    parents. Counts that sites suppressed are drawn as 0. The title says how many they are, and each panel
    gives the range of its accuracy.
    """
    tree = runs[0].tree
    panels: list[tuple[str, NDArray[np.int64], Sequence[float] | None]] = []
    for run, label in zip(runs, labels(runs), strict=True):
        assert run.confusion is not None
        argmax, path = run.confusion["argmax"][level], run.confusion["path"][level]
        figures = run.summary.levels[level]
        heading = "best class of the level" if len(runs) == 1 else label
        panels.append((heading, argmax, bounds_of(figures)))
        if len(runs) == 1:
            panels.append(("best root-to-leaf path", path, bounds_of(figures, "consistent_accuracy")))
    cells = sorted({text for run in runs if (text := suppression(run.summary.levels[level]))})
    side = float(np.clip(2.6 + 0.2 * tree.sizes[level], 4.2, 8.6))
    what = f"Confusion of test images at level '{tree.levels[level]}'" + "".join(
        f", {text}" for text in cells
    )
    picture = new_figure(side * len(panels) + 1, side + 0.9, title(what, runs), "compressed")
    grid = picture.subplots(1, len(panels), squeeze=False)[0]
    drawn = None
    for number, (axes, (heading, counts, bounds)) in enumerate(zip(grid, panels, strict=True)):
        drawn = _draw_matrix(axes, tree, level, counts)
        accuracy = float(np.trace(counts) / max(1, counts.sum()))
        axes.set_title(f"{heading}: accuracy {share_text(accuracy, bounds)}")
        axes.set_xlabel("predicted")
        if number == 0:
            axes.set_ylabel("true")
        else:
            axes.tick_params(left=False, labelleft=False)
    assert drawn is not None
    picture.colorbar(drawn, ax=list(grid), label="share of the true class", fraction=0.03, pad=0.01)
    return picture


def _draw_matrix(axes: Axes, tree: Hierarchy, level: int, counts: NDArray[np.int64]) -> AxesImage:
    order = tree_order(tree, level)
    shares = _row_shares(counts[np.ix_(order, order)])
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    number = len(order)
    if number <= _MOST_NUMBERED:
        # Smaller shares would be printed as 0.00.
        for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005):
            share = shares[row, column]
            colour = "white" if share > 0.55 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=7.5)
    edges = _edges(tree, level, order, above=level - 1)
    coarse = _edges(tree, level, order, above=0)
    for edge in edges:
        width = 1.6 if edge in coarse and level > 1 else 0.6
        width *= 1.0 if number <= _MOST_NAMED else 0.5
        axes.axhline(edge, color=GREY, linewidth=width)
        axes.axvline(edge, color=GREY, linewidth=width)
    places, names = _named_places(tree, level, order, edges)
    size = 8.0 if number <= 30 else 6.0
    short = number <= 4
    shown = [wrapped(name, 14) if short else _shortened(name) for name in names]
    axes.set_xticks(places, shown, rotation=0 if short else 90, fontsize=size)
    axes.set_yticks(places, shown, fontsize=size)
    axes.tick_params(length=2)
    return drawn


def _named_places(
    tree: Hierarchy, level: int, order: Sequence[int], edges: Sequence[float]
) -> tuple[list[float], list[str]]:
    """Return places and names on the axes, of each class, of each block of siblings, or of none."""
    number = len(order)
    if number <= _MOST_NAMED:
        return list(range(number)), [tree.classes[level][node] for node in order]
    if level == 0:
        return [], []
    blocks = list(pairwise([-0.5, *edges, number - 0.5]))
    parents = [tree.classes[level - 1][node] for node in tree_order(tree, level - 1)]
    # Names of parents with few children would overlap, so they are left out.
    named = [
        ((low + high) / 2, name)
        for (low, high), name in zip(blocks, parents, strict=True)
        if high - low >= number / _MOST_NAMED
    ]
    return [place for place, _ in named], [name for _, name in named]


def tree_order(tree: Hierarchy, level: int) -> list[int]:
    """Return the classes of a level in the order of the tree, with the children of a parent together."""
    ancestors = sorted({tuple(path[: level + 1]) for path in tree.paths.tolist()})
    return [path[-1] for path in ancestors]


def _row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the counts with each row divided by its sum, and NaN where the sum is 0."""
    sums = counts.sum(axis=1, keepdims=True).astype(np.float64)
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, sums, out=shares, where=sums > 0)
    return shares


def _edges(tree: Hierarchy, level: int, order: Sequence[int], above: int) -> list[float]:
    """Return the places, in cells, at which the ancestor at level ``above`` changes.

    The coarsest classes have no ancestor, and so no such place.
    """
    if level == 0:
        return []
    ancestor = dict(tree.paths[:, [level, above]].tolist())
    nodes = [ancestor[node] for node in order]
    return [place - 0.5 for place in range(1, len(order)) if nodes[place] != nodes[place - 1]]


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
