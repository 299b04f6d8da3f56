"""Draws docs/images/architecture.png: the branches, and what goes from one to the next.

python tools/draw_architecture.py        # needs matplotlib (extra `show`)
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "architecture.png"
INK, QUIET = "#1f2933", "#5f6c7b"
# A color a modality; what joins them is gray.
TEXT, VISION, AUDIO, JOINED = "#f6e3b4", "#cfe3d4", "#cddcf0", "#e6e8eb"
# The packed row: (width in positions, modality, what stands there).
ROW = [
    (5, TEXT, "text"),
    (7, VISION, "image"),
    (4, TEXT, "text"),
    (6, AUDIO, "audio heard"),
    (4, TEXT, "text"),
    (6, AUDIO, "audio spoken"),
]


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 6.4), dpi=130)
    axes.set(xlim=(0, 110), ylim=(-1, 64), aspect="equal")
    axes.axis("off")

    # Inputs at the bottom, their encoders above them.
    draw_input(axes, 10, "text")
    draw_input(axes, 38, "images, video frames")
    draw_input(axes, 67, "audio, 16 kHz")
    draw_box(axes, 10, 14, 17, TEXT, "token\nembedding", "llm")
    draw_box(axes, 38, 14, 25, VISION, "vision tower, 32 layers\nprojector: 2x2 patches to 1", "vision")
    draw_box(axes, 67, 14, 22, AUDIO, "encoder, 32 layers\n8 codebooks, 12.5 Hz", "audio_encoder")
    draw_box(axes, 96, 14, 20, AUDIO, "embedding of codes\nsum of 8 tables", "audio_head")
    for x in (10, 38, 67):
        draw_arrow(axes, (x, 4.4), (x, 9.8))
    draw_arrow(axes, (78.2, 14), (85.8, 14), "codes")

    # The row that the language model reads.
    left, unit, low = 9, 2.87, 26
    for width, color, label in ROW:
        for position in range(width):
            axes.add_patch(plt.Rectangle((left + position * unit, low), unit, 3, facecolor=color, edgecolor="white"))
        axes.text(left + width * unit / 2, low + 1.4, label, ha="center", va="center", fontsize=8, color=INK)
        left += width * unit
    axes.text(101.6, low + 1.4, "one row,\nup to 64k", va="center", fontsize=8, color=QUIET)
    for x, to in ((10, 14), (38, 33), (92, 66), (98, 94)):
        draw_arrow(axes, (x, 18.2), (to, 25.6))
    draw_box(
        axes,
        55,
        35.5,
        92,
        JOINED,
        "language model, 28 layers: grouped-query attention inside each document, rotary positions",
        "llm",
    )
    draw_arrow(axes, (55, 29.4), (55, 31.4))

    # Outputs at the top.
    draw_box(axes, 16, 47, 20, TEXT, "text head\n152,064 tokens", "llm")
    draw_box(axes, 43, 47, 22, AUDIO, "audio head: 8 codes\none after the other", "audio_head")
    draw_box(axes, 70, 47, 20, AUDIO, "mel decoder", "audio_decoder")
    draw_box(axes, 95, 47, 20, AUDIO, "flow matching\n10 steps", "flow")
    draw_arrow(axes, (16, 39.7), (16, 42.8))
    draw_arrow(axes, (43, 39.7), (43, 42.8))
    draw_arrow(axes, (54.2, 47), (59.8, 47), "codes")
    draw_arrow(axes, (80.2, 47), (84.8, 47))
    draw_box(axes, 95, 58, 20, AUDIO, "HiFT vocoder", "vocoder")
    draw_arrow(axes, (95, 51.2), (95, 53.8), "mel", side=3.4)
    draw_arrow(axes, (84.8, 58), (77, 58))
    axes.text(76, 58, "waveform, 24 kHz", ha="right", va="center", fontsize=9, color=INK)
    draw_arrow(axes, (16, 51.2), (16, 55.5))
    axes.text(16, 57, "text", ha="center", va="center", fontsize=9, color=INK)
    axes.text(
        84,
        2.6,
        "in monospace: the branch, which trains,\nis saved and is converted by itself",
        fontsize=8,
        color=QUIET,
    )
    figure.savefig(TARGET, bbox_inches="tight", pad_inches=0.1)
    print(TARGET)


def draw_input(axes: Axes, x: float, label: str) -> None:
    """Writes what goes in below its encoder."""
    axes.text(x, 2.6, label, ha="center", va="center", fontsize=9, color=INK)


def draw_box(axes: Axes, x: float, y: float, width: float, color: str, label: str, branch: str) -> None:
    """Draws a part of the model around (x, y), with its branch's name in its lower right corner."""
    height = 8
    low = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            low,
            width,
            height,
            boxstyle="round,pad=0.2,rounding_size=0.8",
            facecolor=color,
            edgecolor=QUIET,
            linewidth=0.8,
        )
    )
    axes.text(x, y + 1, label, ha="center", va="center", fontsize=8.5, color=INK)
    axes.text(
        x + width / 2 - 0.5, low[1] + 0.9, branch, ha="right", va="center", fontsize=7, family="monospace", color=QUIET
    )


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", side: float = 0
) -> None:
    """Draws an arrow, its label above its middle, or beside it."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=QUIET, linewidth=0.9))
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x + side, y + (0 if side else 1.2), label, ha="center", va="center", fontsize=7.5, color=QUIET)


if __name__ == "__main__":
    main()
