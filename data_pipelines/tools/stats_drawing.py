"""A figure of distributions by type (matplotlib, which only the drawing modules import)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from baichuan_omni_jax.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.tools.stats import Quantity

BINS = 40
COLUMNS = 2
MOST_TYPES = 19  # with colours of their own; the rest share grey


def draw(types: Sequence[str], quantities: "Sequence[Quantity]", path: Path) -> None:
    """Histograms of the quantities that have values, types stacked, in logarithmic bins.

    Raises ConfigError when `path` cannot be written.
    """
    shown = [quantity for quantity in quantities if len(quantity.values)]
    colours = _colours(types)
    rows = -(-len(shown) // COLUMNS)
    height = 3.0 * rows + 1.2
    figure = Figure(figsize=(14, height), dpi=100)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.04, 1.3 / height, 0.99, 1 - 0.4 / height, wspace=0.09, hspace=0.28)
    for axes, quantity in zip(figure.subplots(max(rows, 1), COLUMNS, squeeze=False).flat, shown, strict=False):
        _histogram(axes, quantity, colours)
    for axes in figure.axes[len(shown) :]:
        axes.set_visible(False)
    handles = [Patch(facecolor=colour, label=name or "(no type)") for name, colour in zip(types, colours, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=8, fontsize=9, frameon=False)
    try:
        with matplotlib.rc_context({"text.parse_math": False}):
            figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _histogram(axes: Axes, quantity: "Quantity", colours: list) -> None:
    """Zeros have no place on a logarithmic axis: the title tells how many there are."""
    present = quantity.values > 0
    values, types = quantity.values[present], quantity.types[present]
    zeros = f", {(~present).sum()} more are 0" if not present.all() else ""
    median = f", median {np.median(values):.4g}" if len(values) else ""
    axes.set_title(f"{quantity.name} ({len(values)}{median}{zeros})", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not len(values):
        return
    edges = np.geomspace(values.min(), max(values.max(), values.min() * 1.1), BINS + 1)
    bottom = np.zeros(BINS)
    for number, colour in enumerate(colours):
        counts, _ = np.histogram(values[types == number], edges)
        if counts.any():
            axes.stairs(bottom + counts, edges, baseline=bottom, fill=True, color=colour)
            bottom = bottom + counts
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _colours(types: Sequence[str]) -> list:
    table = matplotlib.colormaps["tab20"].colors
    return [table[number % 20] if number < MOST_TYPES else (0.6, 0.6, 0.6) for number in range(len(types))]
