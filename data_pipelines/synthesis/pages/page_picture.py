"""Pages as pictures: letters on paper, and the wear of print and camera."""

import random
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipelines.synthesis.pages.layout import LEADING, Page, PageStyle

GRID = 28  # pixels of a visual token: a picture of whole tokens is not resized


def measurer(style: PageStyle) -> Callable[[str], float]:
    """The function that tells how many pixels wide a text is."""
    return _font(style.font, style.size).getlength


def draw_page(page: Page, style: PageStyle) -> Image.Image:
    """A page with its text, cut below the last line, its height a multiple of 28."""
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
    """The picture a little turned, blurred, noisy and unevenly lit: all of it readable still."""
    turned = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    blurred = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(blurred, np.float32) * np.linspace(1, rng.uniform(0.8, 1), image.width)[:, None]
    pixels += noise.normal(0, rng.uniform(1, 8), pixels.shape[:2])[..., None]
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def encode(image: Image.Image, worn: bool, rng: random.Random) -> tuple[bytes, str]:
    """(file, suffix): PNG for a clean picture, JPEG for a worn one."""
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
