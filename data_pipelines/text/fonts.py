"""Fonts for pages: which font files have every character of a text."""

import random
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import SampleError
from data_pipelines.text.lettering import CHINESE_FAMILIES

_OWN = ("DejaVu Sans", "DejaVu Serif")  # come with matplotlib; no Chinese


def find_fonts(given: Sequence[Path] = ()) -> tuple[str, ...]:
    """The font files to write with: `given`, then what is installed and has Chinese, then matplotlib's own.

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
    """One of the fonts that have every character of `text`.

    Raises SampleError: "no_font" when none has; "bad_script" for writing that letter after letter from the left does
    not set right: right-to-left scripts and signs that combine.
    """
    characters = {character for character in text if not character.isspace()}
    for character in sorted(characters):
        if unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character).startswith("M"):
            raise SampleError("bad_script", f"{unicodedata.name(character, 'a character')} cannot be set on a page")
    able = [path for path in fonts if all(ord(character) in _charmap(path) for character in characters)]
    if not able:
        missing = min(({c for c in characters if ord(c) not in _charmap(path)} for path in fonts), key=len)
        named = "".join(sorted(missing)[:8])
        raise SampleError("no_font", f"no font has all characters; the nearest lacks {len(missing)}, such as {named}")
    return rng.choice(able)


@lru_cache
def _charmap(path: str) -> dict[int, int]:
    return font_manager.get_font(path).get_charmap()
