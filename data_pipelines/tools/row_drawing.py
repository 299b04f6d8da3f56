"""Figures of packed rows and of one document (matplotlib, which only this module and `lettering.py` import)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.text.fonts import Lettering
from data_pipelines.tools.row_views import DocumentView, ImageView, MelView, RowView, SlotContent, SlotLoss, describe

CONTENTS = {
    SlotContent.TEXT: ("text", "#b9c6d8"),
    SlotContent.MARK: ("start or end mark", "#3a3f47"),
    SlotContent.IMAGE: ("image", "#2a9d6f"),
    SlotContent.FRAME: ("video frame", "#2f6fc4"),
    SlotContent.AUDIO: ("audio", "#f2a65a"),
    SlotContent.SPEECH: ("speech", "#c9457a"),
    SlotContent.PADDING: ("padding", "#ffffff"),
}
LOSSES = {
    SlotLoss.TEXT: ("text", "#5b4bb5"),
    SlotLoss.AUDIO: ("audio codes", "#e0362c"),
    SlotLoss.NONE: ("nothing", "#eceef1"),
}
WIDTH, MARGIN, LEFT = 15.0, 0.3, 1.05  # inches: the figure, its margins, where strips begin
MAX_LINES, MAX_IMAGES, MAX_MELS, MAX_TYPES = 12, 10, 3, 14
DPI = 100


class FigureBlock(NamedTuple):
    """A horizontal band of the figure: its height in inches, and what draws it, given the height of its lower edge."""

    height: float
    draw: Callable[["FigurePage", float], None]


class FigurePage:
    """A figure of blocks from top to bottom; places are in inches from its lower left corner."""

    def __init__(self, blocks: list[FigureBlock], lettering: Lettering):
        self.height = sum(block.height for block in blocks) + 2 * MARGIN
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI)
        FigureCanvasAgg(self.figure)
        self.lettering = lettering
        bottom = self.height - MARGIN
        for block in blocks:
            bottom -= block.height
            block.draw(self, bottom)

    def axes(self, left: float, bottom: float, width: float, height: float):
        """Adds axes with these sides, in inches."""
        return self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height))

    def text(self, left: float, bottom: float, text: str, **style) -> None:
        """Writes a line of text; `style` as matplotlib takes it."""
        self.figure.text(left / WIDTH, bottom / self.height, self.lettering.drawable(text), va="bottom", **style)


def draw(rows: list[RowView], document: DocumentView, path: Path, notes: Sequence[str] = ()) -> None:
    """Writes the figure of packed rows and, below them, of one document.

    Args:
        rows: packed rows, drawn one below the other.
        document: one of their documents, or another.
        path: the file; its suffix is the format.
        notes: stand under the headline.

    Raises:
        ConfigError: when matplotlib does not know the format.
        OSError: when the file cannot be written.
    """
    # Types get colors in the order of their names: the same data are drawn alike.
    lettering = Lettering()
    types = dict.fromkeys(segment.document.type for row in rows for segment in row.segments)
    colors = {kind: _pale(i) for i, kind in enumerate(sorted(types))}
    # The page from top to bottom; its height follows from the blocks.
    blocks = [_headline("Packed rows", notes), _legend(colors)]
    blocks += [_row(number, row, colors) for number, row in enumerate(rows)]
    blocks += _document(document, colors)
    # Text of documents may hold dollar signs, and scripts that no single font has.
    with matplotlib.rc_context({"text.parse_math": False, "font.family": lettering.families}):
        page = FigurePage(blocks, lettering)
        if lettering.replaced:
            page.text(MARGIN, 0.08, lettering.note, size=8, color="#666666")
        try:
            page.figure.savefig(path)
        except ValueError as error:
            raise ConfigError(f"--out {path}: {error}") from error


def _headline(text: str, notes: Sequence[str] = (), size: int = 15) -> FigureBlock:
    def draw_it(page: FigurePage, bottom: float) -> None:
        for line, note in enumerate(reversed(notes)):
            page.text(MARGIN, bottom + 0.05 + 0.22 * line, note, size=10, color="#a02020")
        page.text(MARGIN, bottom + 0.08 + 0.22 * len(notes), text, size=size, weight="bold")

    return FigureBlock(0.42 + 0.22 * len(notes), draw_it)


def _legend(colors: dict) -> FigureBlock:
    """Draws a line a strip, in the order of the strips."""
    types = [Patch(facecolor=color, label=kind or "no type") for kind, color in colors.items()]
    lines = [
        ("document", types),
        ("holds", [_chip(*named) for named in CONTENTS.values()]),
        ("predicts", [_chip(*named) for named in LOSSES.values()]),
    ]

    def draw_it(page: FigurePage, bottom: float) -> None:
        for place, (title, handles) in enumerate(reversed(lines)):
            lower = bottom + 0.27 * place + 0.08
            page.text(MARGIN, lower + 0.05, title, size=9.5, weight="bold")
            axes = page.axes(LEFT + 0.1, lower, WIDTH - LEFT - MARGIN, 0.26)
            axes.axis("off")
            shape = {"ncol": MAX_TYPES + 1, "columnspacing": 0.9, "handlelength": 1.2, "fontsize": 8.5}
            # One line a strip: what does not fit is left out, visibly.
            if len(handles) > MAX_TYPES:
                handles = [*handles[:MAX_TYPES], Patch(alpha=0, label="...")]
            axes.legend(handles=handles, loc="center left", frameon=False, borderpad=0, borderaxespad=0, **shape)

    return FigureBlock(0.27 * len(lines) + 0.15, draw_it)


def _chip(name: str, color: str) -> Patch:
    padding = name == "padding"
    return Patch(facecolor=color, edgecolor="#999999", hatch="////" if padding else None, label=name, linewidth=0.5)


def _row(number: int, row: RowView, colors: dict) -> FigureBlock:
    def draw_it(page: FigurePage, bottom: float) -> None:
        page.text(LEFT, bottom + 1.62, f"row {number}", size=10.5, weight="bold")
        page.text(LEFT + 0.65, bottom + 1.62, f"{len(row.segments)} documents; filled: {row.describe_fill()}", size=10)
        _strips(page, bottom + 0.42, 1.17, row, colors)

    return FigureBlock(1.92, draw_it)


def _strips(page: FigurePage, bottom: float, height: float, row: RowView, colors: dict, labels: bool = True) -> None:
    """Documents, contents and losses of a row above each other, over the slots of the row."""
    slots = len(row.contents)
    axes = page.axes(LEFT, bottom, WIDTH - LEFT - MARGIN, height)
    # Strips are one unit high, from below: losses, contents and, with labels, documents.
    axes.set(xlim=(0, slots), ylim=(0, 3 if labels else 2))
    axes.set_yticks([2.5, 1.5, 0.5] if labels else [1.5, 0.5], ["document", "holds", "predicts"][0 if labels else 1 :])
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlabel("slot of the row" if labels else "slot of the document", fontsize=9, labelpad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # Colors are looked up by kind and stretched over the slots: one image a strip, whatever the row's length.
    for place, values, palette in ((1, row.contents, CONTENTS), (0, row.losses, LOSSES)):
        table = np.array([to_rgb(color) for _, (_, color) in sorted(palette.items())])
        extent = (0, slots, place + 0.06, place + 0.94)
        axes.imshow(table[values][None], extent=extent, aspect="auto", interpolation="nearest")
    for segment in row.segments if labels else ():
        _segment(page, axes, segment, colors)
    # Runs of padding, by the slots where it begins and ends, are hatched over all strips.
    padding = np.concatenate([[0], (row.contents == SlotContent.PADDING).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(padding))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        shape = {"facecolor": "#ffffff", "edgecolor": "#9aa0a8", "hatch": "////", "linewidth": 0.5}
        axes.add_patch(Rectangle((start, 0.06), stop - start, 2.88 if labels else 1.88, **shape))


def _segment(page: FigurePage, axes, segment, colors: dict) -> None:
    """Draws a document's box with its id in it where there is room, and its edges drawn through all strips."""
    # The id where it fits, else the type, else nothing (`Lettering.fit`).
    width = segment.stop - segment.start
    color = colors[segment.document.type]
    axes.add_patch(Rectangle((segment.start, 2.06), width, 0.88, facecolor=color, edgecolor="white", linewidth=1))
    axes.plot([segment.start] * 2, [0, 3], color="#20242a", linewidth=0.9)
    inches = width / (axes.get_xlim()[1]) * (WIDTH - LEFT - MARGIN)
    if label := page.lettering.fit(segment.document.id, segment.document.type, inches - 0.05, size=7.5):
        axes.text(
            segment.start + width / 2, 2.5, label, ha="center", va="center", size=7.5, linespacing=1.05, clip_on=True
        )


def _document(view: DocumentView, colors: dict) -> list[FigureBlock]:
    document = view.document
    tokens = len(view.row.contents)
    title = f"Document {document.id} ({document.location}, {tokens} tokens)"

    def strips(page: FigurePage, bottom: float) -> None:
        _strips(page, bottom + 0.42, 0.72, view.row, colors, labels=False)

    # What it says, what its slots hold, and its media as the model gets them.
    blocks = [_headline(title), _prompt(view), FigureBlock(1.3, strips)]
    if view.images:
        blocks += _draw_images(view.images)
    if view.mels:
        blocks += _mels(view.mels)
    return blocks


def _prompt(view: DocumentView) -> FigureBlock:
    """Draws the prompt's elements, one a line; what is to be learned is marked."""
    shown, left_out = view.elements[:MAX_LINES], len(view.elements) - MAX_LINES

    def draw_it(page: FigurePage, bottom: float) -> None:
        for place, element in enumerate(shown):
            kind, text, learned = describe(element)
            name, color = CONTENTS[kind]
            height = bottom + 0.08 + 0.23 * (len(shown) - place - 1 + (left_out > 0))
            page.axes(LEFT, height + 0.015, 0.16, 0.14).set(xticks=[], yticks=[], facecolor=color)
            page.text(LEFT + 0.26, height, name, size=10)
            if learned:
                page.text(LEFT + 1.35, height, "learned", size=10, color=LOSSES[SlotLoss.TEXT][1], weight="bold")
            page.text(LEFT + 2.0, height, page.lettering.shorten(text, 110), size=10)
        if left_out > 0:
            page.text(LEFT + 0.26, bottom + 0.08, f"... and {left_out} more parts", size=10, color="#666666")

    return FigureBlock(0.23 * (len(shown) + (left_out > 0)) + 0.18, draw_it)


def _draw_images(images: list[ImageView]) -> list[FigureBlock]:
    """Draws images to one scale, with the number of each visual token in its cell of 2 x 2 patches."""
    shown = images[:MAX_IMAGES]
    title = "Images, put together again from their patches; in each cell of 2 x 2 patches the number of its token"
    if len(images) > len(shown):
        title += f" (the first {len(shown)} of {len(images)})"
    # One scale for all, so that sizes can be compared; the row must fit in width and in height.
    gap, room = 0.2, WIDTH - LEFT - MARGIN
    across = sum(image.pixels.shape[1] for image in shown)
    tallest = max(image.pixels.shape[0] for image in shown)
    scale = min((room - gap * (len(shown) - 1)) / across, 2.1 / tallest)

    def draw_it(page: FigurePage, bottom: float) -> None:
        left = LEFT
        for number, image in enumerate(shown, start=1):
            height, width = (scale * side for side in image.pixels.shape[:2])
            axes = page.axes(left, bottom + 0.15 + scale * tallest - height, width, height)
            _draw_image(axes, image)
            axes.set_title(f"{number}: {CONTENTS[image.kind][0]}", fontsize=9, pad=3, color=CONTENTS[image.kind][1])
            left += width + gap

    return [_caption(title), FigureBlock(scale * tallest + 0.42, draw_it)]


def _draw_image(axes, image: ImageView) -> None:
    # A grid of visual tokens over the image, the number of each in its cell: order and place can be checked by eye.
    height, width = image.pixels.shape[:2]
    axes.imshow(image.pixels, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for edge in range(28, width, 28):
        axes.axvline(edge, color="white", linewidth=0.5, alpha=0.6)
    for edge in range(28, height, 28):
        axes.axhline(edge, color="white", linewidth=0.5, alpha=0.6)
    outline = [withStroke(linewidth=1.6, foreground="#202020")]
    if len(image.centers) <= 64:  # more would be a blur
        for number, (x, y) in enumerate(image.centers):
            axes.text(x, y, str(number), size=7.5, color="white", ha="center", va="center", path_effects=outline)


def _mels(mels: list[MelView]) -> list[FigureBlock]:
    shown = mels[:MAX_MELS]
    title = "Log mel of each window of audio"
    if len(mels) > len(shown):
        title += f" (the first {len(shown)} of {len(mels)})"
    # One time scale for all windows.
    gap = 0.65
    slot = (WIDTH - LEFT - MARGIN - gap * (MAX_MELS - 1)) / len(shown) if len(shown) > 1 else WIDTH - LEFT - MARGIN
    scale = min(slot / max(view.seconds for view in shown), 2.5)  # inches a second

    def draw_it(page: FigurePage, bottom: float) -> None:
        for place, view in enumerate(shown):
            axes = page.axes(LEFT + place * (slot + gap), bottom + 0.5, max(scale * view.seconds, 0.8), 1.35)
            _mel(page, axes, view, letters=int(slot * 12))

    return [_caption(title), FigureBlock(2.15, draw_it)]


def _mel(page: FigurePage, axes, view: MelView, letters: int) -> None:
    bins = len(view.mel)
    extent = (view.start, view.start + view.seconds, 0, bins)
    axes.imshow(view.mel, origin="lower", extent=extent, aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_xlabel("seconds", fontsize=9, labelpad=1)
    axes.set_ylabel(f"mel bin (of {bins})", fontsize=9, labelpad=1)
    axes.tick_params(labelsize=8)
    title = f"{CONTENTS[view.kind][0]}: {len(view.mel[0])} frames, {view.code_frames} code frames, {view.name}"
    axes.set_title(page.lettering.shorten(title, letters), fontsize=9, loc="left", pad=3)


def _caption(text: str) -> FigureBlock:
    return FigureBlock(0.3, lambda page, bottom: page.text(LEFT, bottom + 0.04, text, size=10.5, weight="bold"))


def _pale(place: int) -> tuple[float, float, float]:
    """Chooses a pale color; neighboring places get hues far apart, 0.38 of the circle."""
    return tuple(hsv_to_rgb(((place * 0.382) % 1.0, 0.28 if place % 2 else 0.42, 0.96)))
