"""Define the style of every figure, with palette, fonts and class colours, and write figures to disk.

Figures are drawn through Figure and FigureCanvasAgg objects, with no display, no pyplot and no global figure.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from common.errors import writable
from common.files import write_bytes
from common.hierarchy import Hierarchy

_DPI = 130

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")
"""Okabe & Ito's colours, told apart with every common colour blindness; grey for their black."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")

GREY = "#555555"


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the matplotlib settings of this project's figures, and restore the previous ones afterwards."""
    with rc_context(
        {
            "font.size": 9.0,
            "axes.titlesize": 10.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "figure.titlesize": 12.0,
            "figure.titleweight": "bold",
            # A class name may hold a dollar sign, which would otherwise start a formula.
            "text.parse_math": False,
        }
    ):
        yield


def new_figure(
    width: float, height: float, title: str, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """Return an empty figure of this size in inches.

    The layout ``compressed`` draws panels of fixed shape close together.
    """
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, completely or not at all.

    Raises:
        UserError: it cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    with writable(f"the picture {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, picture.getvalue())
    return path


def bare(axes: Axes) -> None:
    """Remove ticks, grid and frame from a panel."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def wrapped(text: str, width: int) -> str:
    """Return the text over several lines, with words longer than ``width`` characters broken."""
    return "\n".join(textwrap.wrap(text, width)) or text


@dataclass(frozen=True)
class ClassStyle:
    """Hold colour and marker of one class, which are the same in every figure."""

    colour: str
    marker: str


def class_styles(tree: Hierarchy, level: int) -> list[ClassStyle]:
    """Return one style per class of ``level``.

    The coarsest classes take the palette in turn, and another marker each time it starts again. A class
    below keeps the hue of its coarsest ancestor, and siblings differ by lightness and marker.
    """
    top: list[int] = [0] * tree.sizes[level]
    for path in tree.paths:
        top[path[level]] = int(path[0])
    styles = []
    for node, ancestor in enumerate(top):
        relatives = [other for other, its in enumerate(top) if its == ancestor]
        rank = relatives.index(node)
        turn = ancestor // len(PALETTE) if level == 0 else rank
        colour = _shade(PALETTE[ancestor % len(PALETTE)], rank, len(relatives))
        styles.append(ClassStyle(colour, MARKERS[turn % len(MARKERS)]))
    return styles


def _shade(colour: str, rank: int, number: int) -> str:
    """Return the colour mixed with black for the first relative, through itself, to white for the last."""
    if number == 1:
        return colour
    place = 2 * rank / (number - 1) - 1
    target, amount = (0.0, 0.5 * -place) if place < 0 else (1.0, 0.55 * place)
    red, green, blue = ((1 - amount) * part + amount * target for part in to_rgb(colour))
    return to_hex((red, green, blue))
