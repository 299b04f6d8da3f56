"""Fonts of figures and pages: which font files have the characters of a text, and which text fits a box."""

import random
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import SampleError

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
        """Writes `text` on one line or more, runs of characters without a font replaced by `[n characters]`."""
        pieces = []
        for known, run in groupby(text, key=lambda character: character == "\n" or ord(character) in self._known):
            characters = "".join(run)
            self.replaced |= not known
            pieces.append(characters if known else f"[{len(characters)} characters]")
        return "".join(pieces)

    def shorten(self, text: str, length: int) -> str:
        """Shortens to one line of at most `length` characters that can be drawn."""
        text = self.drawable(re.sub(r"\s+", " ", text))
        return text if len(text) <= length else text[: length - 4] + " ..."

    def fit(self, name: str, kind: str, inches: float, size: float) -> str:
        """Fits a document's name into a box: all of it, in one line or two, its type, or nothing.

        Args:
            name: the document's id.
            kind: its type.
            inches: how wide the box is.
            size: of the letters, in points.

        Returns:
            What fits, lines parted by a line end.
        """
        breaks = [match.end() for match in re.finditer(r"[-_ ]", name)]
        balanced = sorted(breaks, key=lambda place: abs(2 * place - len(name)))
        for label in (name, *(f"{name[:place]}\n{name[place:]}" for place in balanced), kind):
            label = self.drawable(label)
            if label and max(self._width(line, size) for line in label.split("\n")) <= inches:
                return label
        return ""

    def _width(self, line: str, size: float) -> float:
        """Measures a line in inches."""
        if not line.strip():
            return 0.0
        return TextPath((0, 0), line, size=size, prop=FontProperties(family=self.families)).get_extents().width / 72


_OWN = ("DejaVu Sans", "DejaVu Serif")  # come with matplotlib; no Chinese


def find_fonts(given: Sequence[Path] = ()) -> tuple[str, ...]:
    """Finds the font files to write with: `given`, then what is installed and has Chinese, then matplotlib's own.

    Raises ConfigError for a given file that is no font.
    """
    for path in given:
        try:
            font_manager.get_font(path)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"--font {path} is no readable font: {error}") from error
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    families = [name for name in CHINESE_FAMILIES if name in installed][:1]
    found = [str(Path(font_manager.findfont(name))) for name in (*families, *_OWN)]
    return (*(str(path.resolve()) for path in given), *found)


def choose_font(rng: random.Random, fonts: Sequence[str], text: str) -> str:
    """Chooses one of the fonts that have every character of `text`.

    Raises SampleError: "no_font" when none has; "bad_script" for writing that letter after letter from the left does
    not set right: right-to-left scripts and signs that combine.
    """
    # Refused before any font is looked at: no font sets these right letter by letter.
    characters = {character for character in text if not character.isspace()}
    for character in sorted(characters):
        if unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character).startswith("M"):
            raise SampleError("bad_script", f"{unicodedata.name(character, 'a character')} cannot be set on a page")
    able = [path for path in fonts if all(ord(character) in _characters(path) for character in characters)]
    if not able:
        missing = min(({c for c in characters if ord(c) not in _characters(path)} for path in fonts), key=len)
        named = "".join(sorted(missing)[:8])
        raise SampleError("no_font", f"no font has all characters; the nearest lacks {len(missing)}, such as {named}")
    return rng.choice(able)


@lru_cache
def _characters(path: str) -> frozenset[int]:
    """Returns the characters that a font has."""
    return frozenset(font_manager.get_font(path).get_charmap())
