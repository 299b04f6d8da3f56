"""Text set on pages: words wrapped into lines, lines into columns, columns into pages; no character is lost.

The lines of all pages, joined, are the text again: `"".join(page.text for page in pages)` less the line ends.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# A line does not end after an opening sign, nor begin with a closing one.
_OPEN, _CLOSE = "（《〈「『【〔“‘", "，。、！？；：）》〉」』】〕”’…—·"
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_PIECE = re.compile(rf"[{_OPEN}]*(?:[{_WIDE}]|[^\s{_WIDE}{_OPEN}{_CLOSE}]+|)[{_CLOSE}]* *")

LEADING = 1.4  # height of a line, in font sizes
PARAGRAPH_GAP = 0.6  # between paragraphs, in font sizes


@dataclass(frozen=True)
class PageStyle:
    """Sizes of a page and its letters, in pixels."""

    width: int
    height: int
    font: str
    size: int
    columns: int = 1
    ink: tuple[int, int, int] = (0, 0, 0)
    paper: tuple[int, int, int] = (255, 255, 255)

    @property
    def margin(self) -> int:
        """Pixels around and between columns."""
        return max(20, 2 * self.size)

    @property
    def column_width(self) -> int:
        """Pixels that a line may take."""
        return (self.width - (self.columns + 1) * self.margin) // self.columns


@dataclass(frozen=True)
class TextLine:
    """A line with the spaces it ends in; `ends` says that its paragraph ends there."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Page:
    """Lines with the (x, y) of their upper left corners; `bottom` is where the last of them ends."""

    lines: tuple[tuple[int, int, TextLine], ...]
    bottom: int

    @property
    def text(self) -> str:
        """What a reader reads: wrapped lines joined, a line end after each paragraph."""
        return "".join(line.text + "\n" * line.ends for _, _, line in self.lines).strip()


def normalize(text: str) -> str:
    """Composed characters, single spaces, single line ends; control characters left out."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    text = re.sub(r"[^\S\n]+", " ", text)
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Co", "Cs"))
    return re.sub(r" *\n[ \n]*", "\n", text).strip()


def wrap(text: str, width: int, measure: Callable[[str], float]) -> Iterator[TextLine]:
    """Breaks a normalized text into lines, none wider than `width` where a single character is not.

    `measure` tells the width of a text. Breaks stand at spaces and beside Chinese characters; a longer word is cut.
    """
    # Greedy: a piece goes on the line while it fits; the spaces behind it may stand in the margin.
    for paragraph in text.split("\n"):
        line, used = "", 0.0
        for piece in _fitting(_PIECE.findall(paragraph), width, measure):
            if line and used + measure(piece.rstrip(" ")) > width:
                yield TextLine(line, ends=False)
                line, used = "", 0.0
            line, used = line + piece, used + measure(piece)
        yield TextLine(line, ends=True)


def _fitting(pieces: list[str], width: int, measure: Callable[[str], float]) -> Iterator[str]:
    for piece in pieces:
        if measure(piece.rstrip(" ")) <= width:
            yield piece
        else:
            yield from piece  # character by character


def paginate(lines: Iterator[TextLine], style: PageStyle) -> Iterator[Page]:
    """Lines set from the top into the columns of one page after the other."""
    placed: list[tuple[int, int, TextLine]] = []
    column, y, bottom = 0, style.margin, 0
    for line in lines:
        # A full column: the next one, or the next page. A page takes one line at least, however large.
        if y + LEADING * style.size > style.height - style.margin and y > style.margin:
            column, y = column + 1, style.margin
            if column == style.columns:
                yield Page(tuple(placed), bottom)
                placed, column, bottom = [], 0, 0
        placed.append((style.margin + column * (style.column_width + style.margin), y, line))
        y += round(LEADING * style.size)
        bottom = max(bottom, y)
        y += round(PARAGRAPH_GAP * style.size) * line.ends
    if placed:
        yield Page(tuple(placed), bottom)


def balance(pages: list[Page], style: PageStyle) -> list[Page]:
    """Balances the columns of the last page to about equal height."""
    if style.columns == 1 or not pages:
        return pages
    # The least height at which the last page's lines still fit on one page.
    lines = [line for _, _, line in pages[-1].lines]
    for height in range(2 * style.margin, style.height, style.size):
        last = list(paginate(iter(lines), replace(style, height=height)))
        if len(last) == 1:
            return pages[:-1] + last
    return pages


GRID = 28  # pixels of a visual token: an image of whole tokens is not resized


def measurer(style: PageStyle) -> Callable[[str], float]:
    """Returns the function that tells how many pixels wide a text is."""
    return _font(style.font, style.size).getlength


def draw_page(page: Page, style: PageStyle) -> Image.Image:
    """Draws a page with its text, cut below the last line, its height a multiple of 28."""
    height = min(style.height, -(-(page.bottom + style.margin) // GRID) * GRID)
    image = Image.new("RGB", (style.width, height), style.paper)
    draw, font = ImageDraw.Draw(image), _font(style.font, style.size)
    for x, y, line in page.lines:
        draw.text((x, y + (LEADING - 1) / 2 * style.size), line.text, font=font, fill=style.ink)
    if style.columns > 1 and page.lines[-1][0] > style.margin:
        for column in range(1, style.columns):
            x = column * (style.column_width + style.margin) + style.margin // 2
            draw.line((x, style.margin, x, page.bottom), fill=style.ink)
    return image


def wear(image: Image.Image, rng: random.Random, paper: tuple[int, int, int]) -> Image.Image:
    """Wears an image: a little turned, blurred, noisy and unevenly lit: all of it readable still."""
    # As a scanner or a camera would: turned, out of focus, unevenly lit, noisy.
    turned = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    blurred = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(blurred, np.float32) * np.linspace(1, rng.uniform(0.8, 1), image.width)[:, None]
    pixels += noise.normal(0, rng.uniform(1, 8), pixels.shape[:2])[..., None]
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def encode(image: Image.Image, worn: bool, rng: random.Random) -> tuple[bytes, str]:
    """Encodes an image as (file, suffix): PNG for a clean one, JPEG for a worn one."""
    file = BytesIO()
    if worn:
        image.save(file, "JPEG", quality=rng.randrange(60, 91))
        return file.getvalue(), ".jpg"
    image.save(file, "PNG")
    return file.getvalue(), ".png"


@lru_cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout is part of every Pillow; Raqm is not, and sets letters elsewhere.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
