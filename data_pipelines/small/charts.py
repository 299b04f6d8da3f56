"""Bar charts of three bars, each of a color, of heights 1 to 5."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_pipelines.small.pictures import COLORS
from data_pipelines.small.words import NUMBERS, Ability, Question, ask, is_held_out

SIDE = 84
BARS = 3  # so that each has a column of visual tokens of its own
_LEVEL = 14  # pixels that a bar of height 1 has: a patch
_BASE = 70  # row of the axis
BAR_COLORS = tuple(color for color in COLORS if color not in ("white", "black"))
HEIGHTS = (1, 2, 3, 4, 5)
_TALLEST = ("Which bar is the tallest?", "Which bar is the highest?", "Name the tallest bar.")
_SHORTEST = ("Which bar is the shortest?", "Which bar is the lowest?", "Name the shortest bar.")
_VALUE = ("How tall is the {color} bar?", "What is the value of the {color} bar?", "How high is the {color} bar?")


@dataclass(frozen=True)
class BarChart:
    """Bars from left to right: their colors and heights, all different."""

    colors: tuple[str, ...]
    heights: tuple[int, ...]
    gray: int  # of the background
    width: int  # of a bar in pixels

    def render(self) -> Image.Image:
        """Draws the chart, RGB of `SIDE` pixels a side: bars over an axis, thin lines at each height."""
        image = Image.new("RGB", (SIDE, SIDE), (self.gray,) * 3)
        draw = ImageDraw.Draw(image)
        # Lines at each height, behind the bars: a value is read off by them.
        for height in HEIGHTS:
            row = _BASE - height * _LEVEL
            draw.line([(0, row), (SIDE, row)], fill=(self.gray - 35,) * 3)
        draw.line([(0, _BASE), (SIDE, _BASE)], fill=(0, 0, 0), width=2)
        # Bars, each in the middle of its share of the axis.
        step = SIDE / len(self.colors)
        for index, (color, height) in enumerate(zip(self.colors, self.heights, strict=True)):
            left = round((index + 0.5) * step - self.width / 2)
            draw.rectangle([left, _BASE - height * _LEVEL, left + self.width, _BASE - 1], fill=COLORS[color])
        return image

    def questions(self, rng: random.Random) -> dict[Ability, Question]:
        """Returns a question about the tallest or the shortest bar, and one about the height of a bar."""
        wordings, height = rng.choice([(_TALLEST, max(self.heights)), (_SHORTEST, min(self.heights))])
        return {
            "tallest_bar": ask(rng, wordings, self.colors[self.heights.index(height)]),
            "bar_value": self.value_question(rng, rng.choice(self.colors)),
        }

    def value_question(self, rng: random.Random, color: str) -> Question:
        """Asks for the height of the bar of this color."""
        return ask(rng, _VALUE, NUMBERS[self.heights[self.colors.index(color)]], color=color)

    def caption(self, rng: random.Random) -> str:
        """Lists the bars with their heights."""
        bars = [f"{color} {NUMBERS[height]}" for color, height in zip(self.colors, self.heights, strict=True)]
        return "Bars: " + ", ".join(bars) + "."


def random_chart(rng: random.Random, *, held_out: bool = False) -> BarChart:
    """Draws a chart whose colors and heights, in their order, are trained on, or held out."""
    while True:
        colors, heights = rng.sample(BAR_COLORS, BARS), rng.sample(HEIGHTS, BARS)
        # Sums of products: another order of the same bars is another combination.
        places = [(2 * index + 1) * BAR_COLORS.index(color) for index, color in enumerate(colors)]
        steps = [(index + 1) * height for index, height in enumerate(heights)]
        if is_held_out(*places, *steps) == held_out:
            return BarChart(tuple(colors), tuple(heights), rng.randint(190, 250), rng.randint(14, 22))
