"""Draw the plots of a comparison, with error bars over the seeds.

There are plots of the scores per level, of the bag sizes, of the settings, and of proportions and cost. They
show the lines of table.py. An error bar is the standard deviation over seeds, and is absent with one seed.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from deploy.compare.scenario import Setting
from deploy.compare.table import FIGURES, Line, Statistic
from deploy.figures.style import GREY, LINES, MARKERS, PALETTE, house_style, new_figure, save

_NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1"}
_BAR = 0.7
_SINGLE = 1
"""The bag size of methods that see labels: comparable at every bag size."""


def draw_plots(lines: Sequence[Line], title: str, folder: Path) -> list[Path]:
    """Write every plot that these lines have data for, after removing the plots of an earlier call.

    Args:
        lines: the lines of the table.
        title: of the scenario, or empty.
        folder: where the PNG files are written.

    Returns:
        The paths of the written files.

    Raises:
        UserError: a file cannot be written.
    """
    # A plot that this call does not draw would show figures that the table no longer has.
    for old in folder.glob("*.png"):
        old.unlink()
    settings = list(dict.fromkeys(line.setting for line in lines))
    main = Setting.POOLED.value if Setting.POOLED.value in settings else settings[0]
    title = title or "Comparison"
    pictures: dict[str, Figure] = {}
    with house_style():
        for setting in settings:
            chosen = _at_usual_size([line for line in lines if line.setting == setting])
            where = f"{title}: {setting}, {_bags(chosen)}"
            suffix = "" if setting == main else "_" + re.sub(r"\W+", "_", setting)
            pictures[f"accuracy{suffix}"] = _levels(chosen, "accuracy", f"{where}: accuracy")
            if setting == main:
                for key in FIGURES[1:]:
                    pictures[key] = _levels(chosen, key, f"{where}: {_NAMES[key]}")
                pictures["cost"] = _costs(chosen, f"{where}: proportions and cost")
                every_size = [line for line in lines if line.setting == setting]
                if len(_sizes(every_size)) > 1:
                    pictures["bag_sizes"] = _bag_sizes(every_size, f"{title}: {setting}, by bag size")
        if several := _in_several_settings(lines):
            pictures["settings"] = _settings(several, f"{title}: whose images are trained on")
        return [save(figure, folder / f"{name}.png") for name, figure in pictures.items()]


def _at_usual_size(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of the bag size that most methods have, and those of single images."""
    counts = {size: sum(line.bag_size == size for line in lines) for size in _sizes(lines)}
    usual = max(counts, key=lambda size: counts[size]) if counts else _SINGLE
    return [line for line in lines if line.bag_size in (usual, _SINGLE)]


def _sizes(lines: Sequence[Line]) -> list[int]:
    return sorted({line.bag_size for line in lines} - {_SINGLE})


def _bags(lines: Sequence[Line]) -> str:
    return ", ".join(f"bags of {size}" for size in _sizes(lines)) or "single images"


def _label(line: Line) -> str:
    return f"{line.method} (labels)" if line.bag_size == _SINGLE else line.method


def _levels(lines: Sequence[Line], key: str, title: str) -> Figure:
    """Return a figure with one panel per level and one bar per method."""
    names = list(lines[0].levels)
    figure = new_figure(3.4 * len(names) + 1.6, 0.34 * len(lines) + 1.5, title)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        _bars(panel, lines, lambda line, name=name: line.levels[name][key], 3)  # type: ignore[misc]
        panel.set_title(name)
        panel.set_xlabel(_NAMES[key])
        panel.set_xlim(0, 1.12)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
    return figure


def _costs(lines: Sequence[Line], title: str) -> Figure:
    """Return a figure of the proportion error on held-back bags, the training time and the peak memory."""
    figure = new_figure(11.8, 0.34 * len(lines) + 1.5, title)
    panels = figure.subplots(1, 3, sharey=True)
    labels = (
        ("proportion_l1", "L1 of held-back bags", "sum of |difference of proportions|", 3),
        ("seconds", "Time", "seconds of one process", 0),
        ("memory_mb", "Memory", "MB at the peak", 0),
    )
    for panel, (key, heading, unit, digits) in zip(panels, labels, strict=True):
        # The proportions of a bag of one image are its label, so that L1 is not comparable to that of bags.
        def value(line: Line, key: str = key) -> Statistic | None:
            return None if key == "proportion_l1" and line.bag_size == _SINGLE else line.costs.get(key)

        _bars(panel, lines, value, digits)
        panel.set_title(heading)
        panel.set_xlabel(unit)
        panel.set_xlim(right=panel.get_xlim()[1] * 1.15)
    return figure


def _bars(axes: Axes, lines: Sequence[Line], value: Callable[[Line], Statistic | None], digits: int) -> None:
    """Draw one horizontal bar per line, the first line on top, each labelled with its number."""
    for place, line in enumerate(lines):
        if (statistic := value(line)) is None:
            continue
        colour = GREY if line.bag_size == _SINGLE else PALETTE[0]
        axes.barh(place, statistic.mean, _BAR, color=colour, alpha=0.85)
        if statistic.deviation is not None:
            axes.errorbar(statistic.mean, place, xerr=statistic.deviation, color="black", capsize=3, lw=1)
        end = statistic.mean + (statistic.deviation or 0)
        axes.annotate(
            f"{statistic.mean:.{digits}f}",
            (end, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _bag_sizes(lines: Sequence[Line], title: str) -> Figure:
    """Return a figure with one panel per level that shows the accuracy over the bag size.

    Methods that see labels are drawn as horizontal lines, because their bags hold one image at every size.
    """
    names, sizes = list(lines[0].levels), _sizes(lines)
    methods = [m for m in dict.fromkeys(line.method for line in lines) if len(_of(lines, m)) > 1]
    figure = new_figure(3.6 * len(names) + 2.2, 4.2, title)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for number, method in enumerate(methods):
            own = sorted(_of(lines, method), key=lambda line: line.bag_size)
            statistics = [line.levels[name]["accuracy"] for line in own]
            panel.errorbar(
                [line.bag_size for line in own],
                [statistic.mean for statistic in statistics],
                yerr=[_deviation(statistic) for statistic in statistics],
                color=PALETTE[number % len(PALETTE)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=LINES[number // len(PALETTE) % len(LINES)],
                capsize=3,
                label=method,
            )
        for number, line in enumerate(line for line in lines if line.bag_size == _SINGLE):
            style = LINES[(number + 1) % len(LINES)]
            panel.axhline(line.levels[name]["accuracy"].mean, color=GREY, linestyle=style, label=_label(line))
        panel.set_title(name)
        panel.set_xlabel("images in a bag")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _deviation(statistic: Statistic) -> float:
    """Return the deviation, or NaN where there is none, so that no error bar is drawn.

    A deviation of 0 would claim that several seeds agree.
    """
    return math.nan if statistic.deviation is None else statistic.deviation


def _of(lines: Sequence[Line], method: str) -> list[Line]:
    return [line for line in lines if line.method == method and line.bag_size != _SINGLE]


def _in_several_settings(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of methods that were trained in several settings at one bag size."""
    pairs = [(line.method, line.bag_size) for line in lines]
    return [line for line, pair in zip(lines, pairs, strict=True) if pairs.count(pair) > 1]


def _settings(lines: Sequence[Line], title: str) -> Figure:
    """Return a figure with one panel per level, the methods side by side and one bar per setting."""
    names, settings = list(lines[0].levels), list(dict.fromkeys(line.setting for line in lines))
    groups = list(dict.fromkeys((line.method, line.bag_size) for line in lines))
    several_sizes = len({size for _, size in groups}) > 1
    figure = new_figure(max(7.0, 1.3 * len(groups) * len(names) + 2.4), 4.2, title)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    width = 0.8 / len(settings)
    for panel, name in zip(panels, names, strict=True):
        for number, setting in enumerate(settings):
            own = {(line.method, line.bag_size): line for line in lines if line.setting == setting}
            places = [place for place, group in enumerate(groups) if group in own]
            statistics = [own[groups[place]].levels[name]["accuracy"] for place in places]
            panel.bar(
                [place + (number - (len(settings) - 1) / 2) * width for place in places],
                [statistic.mean for statistic in statistics],
                width,
                yerr=[_deviation(statistic) for statistic in statistics],
                color=PALETTE[number % len(PALETTE)],
                alpha=0.85,
                capsize=2,
                label=setting,
            )
        panel.set_title(name)
        panel.set_xticks(
            range(len(groups)),
            [f"{method}\nbag {size}" if several_sizes else method for method, size in groups],
            rotation=20 if len(groups) > 2 else 0,
        )
        panel.grid(visible=False, axis="x")
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure
