"""What the figures of a report are drawn with: style, bars, heat maps, saving."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from steerlora.reporting.labels import BANNER
from steerlora.reporting.tables import number

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
PAPER = "#BBBBBB"
WIDTH = 9.0
"""Inches; at 150 dots an inch this is 1350 pixels, sharp at a README's 900."""

STYLE = {  # in force while a report's figures are drawn and saved
    "font.size": 10,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


UNDATED = {"Creator": None, "Producer": None, "CreationDate": None}
"""Of a PDF: the same figure gives the same bytes."""


def save(figure: Figure, path: Path, *, meaningful: bool, note: str) -> list[Path]:
    """Write a figure as PNG and as PDF, with the smoke-run banner if need be.

    256 colours are plenty for bars and heat maps, and make the PNG files three times smaller.

    Args:
        path: of the PNG; the PDF lies beside it.
        note: what the figure rests on, to stand under it.

    Returns:
        The PNG and the PDF.
    """
    above = figure.get_supxlabel()
    below = textwrap.fill(note, int(13 * figure.get_figwidth()))
    figure.supxlabel(f"{above}\n{below}" if above else below, fontsize=8)
    if not meaningful:
        size = 2.4 * figure.get_figwidth()
        look = {"color": "#D55E00", "alpha": 0.7, "fontsize": size, "rotation": 12}
        figure.text(0.5, 0.5, BANNER, ha="center", va="center", **look)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    image = Image.open(buffer).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    vector = path.with_suffix(".pdf")
    figure.savefig(vector, metadata=UNDATED)
    return [path, vector]


def as_svg(figure: Figure) -> str:
    """A figure that is saved already, as SVG. The same figure gives the same text."""
    buffer = StringIO()
    with rc_context({"svg.hashsalt": "steerlora", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def panels(count: int, *, columns: int, height: float, **shared: bool) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels in rows of up to ``columns``, ``height`` inches a row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = min(WIDTH, 1.4 + (WIDTH - 1.4) * columns / 3)
    figure = Figure(figsize=(width, 0.8 + height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for place, axis in enumerate(axes):
        axis.set_visible(place < count)
        # With shared axes matplotlib labels the last row alone, which may have gaps.
        if place + columns >= count:
            axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def bars(
    axis: Axes,
    bounds: Sequence[tuple[float, float, float]],
    index: int,
    count: int,
    label: str,
    colour: str = COLOURS[0],
) -> np.ndarray:
    """One series of a grouped bar chart from (value, low, high); returns the bars' centres.

    A bar has an outline, so that one of no height is there to see; where nothing was measured, its
    place says so.
    """
    width = 0.8 / count
    places = np.arange(len(bounds)) + width * (index - (count - 1) / 2)
    values, low, high = np.array(bounds, dtype=float).T
    look = {"color": colour, "edgecolor": colour, "linewidth": 1.5, "zorder": 2.5}
    axis.bar(places, values, width * 0.86, label=label, **look)
    axis.set_xlim(-0.5, len(bounds) - 0.5)  # also where nothing was measured at an end
    arms = np.vstack([values - low, high - values]).clip(min=0)
    look = {"fmt": "none", "ecolor": "black", "elinewidth": 1, "capsize": 2.5, "zorder": 3}
    axis.errorbar(places, values, arms, **look)
    for place in places[np.isnan(values)]:
        look = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 6, "color": "#444444"}
        axis.text(place, 0.98, "not measured", transform=axis.get_xaxis_transform(), **look)
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    return places


def name_ticks(axis: Axes, names: Sequence[str], *, rotate: bool = False) -> None:
    """One name under each place of a bar chart, slanted where there are too many to fit."""
    turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    axis.set_xticks(range(len(names)), names, **turn)


def heat_map(
    axis: Axes,
    values: np.ndarray,
    rows: Sequence[str] | None,
    columns: Sequence[str],
    low: float,
    high: float,
    *,
    size: float,
    digits: int = 2,
) -> AxesImage:
    """Values as colours and as text, which is dark on light cells and light on dark ones."""
    image = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    middle = (low + high) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value <= middle else "black"  # black also where there is none
        text = number(value, digits)
        axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(values)), rows if rows is not None else [""] * len(values))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def outline(axis: Axes, row: int, column: int) -> None:
    """A frame around a cell of a heat map, to be seen on light cells and on dark ones."""
    frame = Rectangle(
        (column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="white", lw=1.2
    )
    frame.set_path_effects([patheffects.withStroke(linewidth=3, foreground="black")])
    axis.add_patch(frame)
