"""Text in figures: fonts that have the characters, lengths that fit."""

import re
from itertools import groupby

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

# Families with Chinese characters; matplotlib's own fonts have none.
CHINESE_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
    "Arial Unicode MS",
    "Droid Sans Fallback",
)


class Lettering:
    """Which fonts a figure uses; `replaced` tells whether characters were left out for want of a font."""

    def __init__(self):
        installed = {entry.name for entry in font_manager.fontManager.ttflist}
        self.families = ["DejaVu Sans", *(name for name in CHINESE_FAMILIES if name in installed)][:2]
        self._known = set()
        for name in self.families:
            self._known |= set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
        self.replaced = False

    note = "[n characters] stands for characters that no installed font has; Noto Sans CJK has the Chinese ones."

    def drawable(self, text: str) -> str:
        """`text` on one line or more, runs of characters without a font replaced by `[n characters]`."""
        pieces = []
        for known, run in groupby(text, key=lambda character: character == "\n" or ord(character) in self._known):
            characters = "".join(run)
            self.replaced |= not known
            pieces.append(characters if known else f"[{len(characters)} characters]")
        return "".join(pieces)

    def shorten(self, text: str, length: int) -> str:
        """One line of at most `length` characters that can be drawn."""
        text = self.drawable(re.sub(r"\s+", " ", text))
        return text if len(text) <= length else text[: length - 4] + " ..."

    def fit(self, name: str, kind: str, inches: float, size: float) -> str:
        """What of a document's name fits into a box: all of it, in one line or two, its type, or nothing."""
        breaks = [match.end() for match in re.finditer(r"[-_ ]", name)]
        balanced = sorted(breaks, key=lambda place: abs(2 * place - len(name)))
        for label in (name, *(f"{name[:place]}\n{name[place:]}" for place in balanced), kind):
            label = self.drawable(label)
            if label and max(self._width(line, size) for line in label.split("\n")) <= inches:
                return label
        return ""

    def _width(self, line: str, size: float) -> float:
        """Inches."""
        if not line.strip():
            return 0.0
        return TextPath((0, 0), line, size=size, prop=FontProperties(family=self.families)).get_extents().width / 72
