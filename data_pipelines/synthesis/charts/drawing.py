"""Charts drawn by matplotlib."""

import random
from decimal import Decimal
from typing import Any, cast

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from PIL import Image

from data_pipelines.synthesis.charts.tables import MAX_WRITTEN, Chart, Series, spell
from data_pipelines.synthesis.pages.layout import GRID

DPI = 100
_PALETTES = ("tab10", "Set2", "Dark2", "Paired")
_LIGHTEST = 0.75  # brightness of a color that is seen on white


def draw_chart(chart: Chart, rng: random.Random, font: str) -> Image.Image:
    """Draws a chart, its sides multiples of 28 pixels, in a size and in colors that `rng` chooses."""
    # The size follows the labels, all sides whole visual tokens: the image is then not resized.
    crowded = len(chart.table.labels) > 8 or max(map(len, chart.table.labels)) > 10
    width = GRID * rng.randrange(24 if crowded else 18, 31)
    height = GRID * rng.randrange(15, 22)
    style = {"font.size": rng.choice((9, 10, 11, 12)), "axes.unicode_minus": False, "axes.grid": rng.random() < 0.5}
    # A dollar sign in a label is no formula.
    # Any: matplotlib types the keys as literals.
    rc: Any = {**style, "axes.axisbelow": True, "grid.alpha": 0.4, "text.parse_math": False}
    with rc_context(rc):
        figure = Figure((width / DPI, height / DPI), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        colors = _colors(rng, max(len(chart.series), len(chart.table.labels) if chart.kind == "pie" else 1))
        _DRAW[chart.kind](axes, chart, colors, rng)
        if chart.table.title:
            axes.set_title(chart.table.title)
        if chart.kind != "pie" and len(chart.series) > 1 and chart.kind != "scatter":
            axes.legend()
        # Last, when all text of the figure is there.
        _set_font(figure, font)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _colors(rng: random.Random, count: int) -> list:
    # Any: the palettes are lists of colors, which the type of a colormap leaves open.
    palette = cast(Any, colormaps[rng.choice(_PALETTES)]).colors
    colors = [(red, green, blue) for red, green, blue in palette if 0.3 * red + 0.6 * green + 0.1 * blue <= _LIGHTEST]
    start = rng.randrange(len(colors))
    return [colors[(start + i) % len(colors)] for i in range(count)]


def _bars(axes: Axes, chart: Chart, colors: list, rng: random.Random) -> None:
    # One series may lie on its side, where long labels have room.
    across = rng.random() < 0.3 and len(chart.series) == 1
    places, share = np.arange(len(chart.table.labels)), 0.8 / len(chart.series)
    # Bars of one label stand side by side around its place, each with its number.
    for i, (series, color) in enumerate(zip(chart.series, colors, strict=True)):
        values, at = list(map(float, series.values)), places + (i - (len(chart.series) - 1) / 2) * share
        draw = axes.barh if across else axes.bar
        bars = draw(at, values, share, color=color, label=series.name)
        axes.bar_label(bars, labels=list(map(spell, series.values)), padding=2)
    axes.margins(x=0.15 if across else None, y=None if across else 0.15)
    (axes.set_yticks if across else axes.set_xticks)(places, chart.table.labels)
    names = (chart.series[0].name if len(chart.series) == 1 else "", chart.table.header)
    axes.set(xlabel=names[0], ylabel=names[1]) if across else axes.set(xlabel=names[1], ylabel=names[0])
    if across:
        axes.invert_yaxis()
    else:
        _turn_labels(axes, chart)


def _lines(axes: Axes, chart: Chart, colors: list, rng: random.Random) -> None:
    places, marker = range(len(chart.table.labels)), rng.choice("os^D")
    for series, color in zip(chart.series, colors, strict=True):
        axes.plot(places, list(map(float, series.values)), color=color, marker=marker, label=series.name)
        # Numbers stand above or below their points, wherever no line runs.
        if chart.written:
            others = [other for other in chart.series if other is not series]
            for place in places:
                value, below = series.values[place], _lies_low(place, series.values, others)
                shift, side = (-6, "top") if below else (5, "bottom")
                point = (place, float(value))
                axes.annotate(spell(value), point, (0, shift), textcoords="offset points", ha="center", va=side)
    axes.margins(y=0.15)
    axes.set_xticks(places, chart.table.labels)
    axes.set(xlabel=chart.table.header, ylabel=chart.series[0].name if len(chart.series) == 1 else "")
    _turn_labels(axes, chart)


def _lies_low(place: int, values: tuple[Decimal, ...], others: list[Series]) -> bool:
    """Returns whether there is more room below a point than above: under the other line, or where the line has
    a dip.
    """
    if others:
        return values[place] < others[0].values[place]
    neighbors = values[max(place - 1, 0) : place] + values[place + 1 : place + 2]
    return all(value > values[place] for value in neighbors)


def _points(axes: Axes, chart: Chart, colors: list, rng: random.Random) -> None:
    x, y = (list(map(float, series.values)) for series in chart.series)
    axes.scatter(x, y, color=colors[0], marker=rng.choice("os^D"), s=rng.randrange(20, 60))
    # Names where there are few points; what the points' values are is read off the axes.
    if len(x) <= MAX_WRITTEN:
        for label, *point in zip(chart.table.labels, x, y, strict=True):
            axes.annotate(label, (point[0], point[1]), (4, 4), textcoords="offset points")
    axes.margins(0.12)
    axes.set(xlabel=chart.series[0].name, ylabel=chart.series[1].name)


def _pie(axes: Axes, chart: Chart, colors: list, rng: random.Random) -> None:
    (series,) = chart.series
    # Shares cannot be read off a pie: every slice says its number.
    numbers = [spell(value) for value in series.values]
    labels = [f"{label}: {value}" for label, value in zip(chart.table.labels, numbers, strict=True)]
    values, turn, edges = list(map(float, series.values)), rng.randrange(360), {"edgecolor": "white"}
    axes.pie(values, labels=labels, colors=colors, startangle=turn, wedgeprops=edges)
    axes.set_xlabel(series.name)


_DRAW = {"bar": _bars, "line": _lines, "scatter": _points, "pie": _pie}


def _turn_labels(axes: Axes, chart: Chart) -> None:
    # Many or long labels would run into each other.
    if sum(map(len, chart.table.labels)) > 50 or max(map(len, chart.table.labels)) > 12:
        axes.tick_params("x", rotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def _set_font(figure: Figure, font: str) -> None:
    """Sets one font file for all that is written; sizes stay."""
    for axes in figure.axes:  # asking for the labels of the ticks makes them
        axes.get_xticklabels()
        axes.get_yticklabels()
    for text in figure.findobj(Text):
        text.set_fontproperties(FontProperties(fname=font, size=text.get_fontsize()))
