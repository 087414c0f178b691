"""Draw the sites' training loss and the errors on held-back bags, round by round."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.run_records import BagsEvaluated, RoundDone, UpdateTaken
from deploy.figures.finished_run import FinishedRun, labels, title
from deploy.figures.style import GREY, LINES, PALETTE, bare, new_figure

_MOST_SITES_NAMED = 10


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
        _say(axes, "the sites sent no training loss")
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
                )
    if not shown:
        kept = any(run.of(BagsEvaluated) for run in runs)
        _say(axes, "withheld by the sites" if kept else "no figures of held-back bags")
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


def _say(axes: Axes, text: str) -> None:
    """Draw an empty panel with a text that says why it is empty."""
    bare(axes)
    axes.set_ylabel("")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
