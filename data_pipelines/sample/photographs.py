"""The two photographs that ship in scikit-learn: crops of them, and what is known to be true of a crop.

What each photograph shows is annotated by hand as outlines of its parts (pixel coordinates of the 640x427 originals);
what a crop shows follows from the outlines inside it, its colors and brightness from its pixels.
"""

import functools
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from baichuan_omni_jax.errors import ConfigError

PHOTOGRAPHS = ("china", "flower")
SIZE = (640, 427)

# Part -> outlines: a polygon, or two corners of an ellipse's box.
OUTLINES = {
    "china": {
        "sky": [
            [(215, 0), (639, 0), (639, 130), (600, 130), (565, 190), (335, 190), (325, 118), (226, 45), (215, 25)],
            [(0, 0), (190, 0), (190, 45), (90, 112), (80, 175), (5, 145), (0, 145)],
        ],
        "tower": [
            [
                *[(205, 28), (222, 60), (322, 125), (325, 170), (330, 235), (352, 250), (345, 310), (372, 340)],
                *[(320, 365), (310, 420), (285, 420), (240, 385), (160, 340), (75, 335), (62, 265), (100, 240)],
                *[(85, 170), (95, 120), (185, 62)],
            ]
        ],
        "roof": [[(205, 60), (322, 125), (320, 137), (97, 132), (95, 120), (185, 66)]],
        "windows": [
            [(100, 188), (322, 188), (322, 235), (100, 235)],
            [(85, 290), (342, 275), (342, 305), (180, 340), (85, 330)],
        ],
        "lake": [[(352, 243), (550, 236), (545, 275), (480, 298), (380, 325), (352, 295)]],
        "trees": [
            [(0, 160), (75, 200), (75, 250), (30, 275), (0, 280)],
            [(0, 320), (75, 345), (160, 340), (240, 385), (285, 400), (285, 426), (0, 426)],
            [(345, 365), (400, 310), (520, 280), (555, 300), (555, 426), (330, 426)],
            [(610, 138), (639, 170), (639, 426), (555, 426), (550, 260)],
        ],
    },
    "flower": {
        "flower": [[(172, 88), (445, 358)]],
        "heart": [[(268, 180), (345, 245)]],
        "bloom": [[(290, 400), (345, 376), (400, 378), (465, 415), (470, 426), (290, 426)]],
        "bud": [[(580, 393), (622, 426)]],
        "leaves": [],  # everything that is neither flower, bloom nor bud; see `part_mask`
    },
}

# A viewer names the tower before the sky behind it and before its windows: areas count by these weights, else 1.
SALIENCE = {"sky": 0.4, "leaves": 0.25, "trees": 0.6, "roof": 0.6, "windows": 0.6, "heart": 0.6}


@dataclass(frozen=True)
class Crop:
    """A piece of a photograph: `box` (left, top, right, bottom) in the original, `size` (width, height) when saved."""

    photo: str
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    mirrored: bool = False
    gray: bool = False


@functools.cache
def photograph(name: str) -> Image.Image:
    """Opens the photograph `name` as RGB, 640x427. Raises ConfigError when scikit-learn is not installed."""
    # Found by path: importing scikit-learn (and SciPy with it) to open two files would cost seconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the sample photographs come with scikit-learn: pip install baichuan_omni_jax[sample]")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "images" / f"{name}.jpg"
    if not path.is_file():
        raise ConfigError(f"scikit-learn is installed but its sample photograph {path} is missing")
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.cache
def part_mask(photo: str, part: str) -> np.ndarray:
    """Bool (427, 640): the pixels of one part of a photograph."""
    canvas = Image.new("1", SIZE)
    draw = ImageDraw.Draw(canvas)
    for outline in OUTLINES[photo][part]:
        (draw.ellipse if len(outline) == 2 else draw.polygon)(outline, fill=1)
    # Leaves are what is left of the flower's photograph.
    mask = np.asarray(canvas)
    if part == "leaves":
        mask = ~(part_mask(photo, "flower") | part_mask(photo, "bloom") | part_mask(photo, "bud"))
    return mask


@functools.cache
def _part_pixels(photo: str, part: str) -> np.ndarray:
    return np.flatnonzero(part_mask(photo, part))


def render(crop: Crop) -> Image.Image:
    """Renders the pixels of a crop, RGB or, for a gray one, L."""
    image = photograph(crop.photo).resize(crop.size, Image.Resampling.BICUBIC, box=crop.box, reducing_gap=3.0)
    if crop.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.convert("L") if crop.gray else image


def save(crop: Crop, path: Path) -> None:
    """Writes a crop as JPEG or PNG, by the path's suffix."""
    if path.suffix == ".jpg":
        render(crop).save(path, quality=88)
    else:
        render(crop).save(path, compress_level=6)


def _inside(crop: Crop, part: str) -> np.ndarray:
    left, top, right, bottom = crop.box
    mask = part_mask(crop.photo, part)[top:bottom, left:right]
    return mask[:, ::-1] if crop.mirrored else mask


def visible_parts(crop: Crop) -> list[str]:
    """Lists the parts that a viewer would name, the most prominent first.

    A part counts when most of it is inside and not tiny, or when it fills a good share of the crop.
    """
    # Two ways to be seen: nearly whole and not tiny, or large in the crop.
    shares = {}
    for part in OUTLINES[crop.photo]:
        inside = _inside(crop, part)
        count = np.count_nonzero(inside)
        share = count / inside.size
        whole = count / len(_part_pixels(crop.photo, part))
        if share >= 0.15 or (whole >= 0.6 and share >= 0.02):
            shares[part] = share * SALIENCE.get(part, 1.0)
    return sorted(shares, key=shares.__getitem__, reverse=True)


def absent_parts(crop: Crop, margin: int = 16) -> list[str]:
    """Lists the parts of either photograph that are certainly not in the crop, not even `margin` pixels outside it."""
    left, top, right, bottom = crop.box
    window = np.s_[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    # Of this photograph what lies outside a margin around the crop: an edge of it might be seen.
    here = [part for part in OUTLINES[crop.photo] if not part_mask(crop.photo, part)[window].any()]
    other = PHOTOGRAPHS[1 - PHOTOGRAPHS.index(crop.photo)]
    # Of the other photograph only what nobody could find here: leaves or trees would make the answer arguable.
    return here + [part for part in OUTLINES[other] if part in ("tower", "roof", "windows", "lake", "flower")]


def place(crop: Crop, part: str) -> tuple[int, int] | None:
    """Returns where a visible part is centered: (row, column), each 0, 1 or 2 for the thirds of the image.

    None for a part that is in no one place: a background, or one that is not at its own center.
    """
    if part == "leaves":
        return None
    inside = _inside(crop, part)
    # The mean of the pixels; a part with a hole there, or in two pieces, has no one place.
    row, column = (int(indices.mean()) for indices in np.nonzero(inside))
    if not inside[row, column]:
        return None
    return 3 * row // inside.shape[0], 3 * column // inside.shape[1]


def dominant_color(crop: Crop) -> str:
    """Returns the commonest of red, orange, yellow, green, teal, blue, brown, white, gray, black among the crop's
    pixels.
    """
    image = render(crop).convert("RGB").resize((32, 32))
    # By hue where there is any, by brightness where there is none; dark warm hues are brown to the eye.
    hue, saturation, value = np.asarray(image.convert("HSV"), np.int32).reshape(-1, 3).T
    names = np.full(hue.shape, "grey", dtype=object)
    bounds = [(12, "red"), (28, "orange"), (44, "yellow"), (105, "green"), (135, "teal"), (175, "blue"), (256, "red")]
    degrees = np.searchsorted([bound for bound, _ in bounds], hue, side="right")
    colored = saturation > 50
    names[colored] = np.array([name for _, name in bounds], dtype=object)[degrees[colored]]
    names[colored & np.isin(names, ["red", "orange", "yellow"]) & (value < 130)] = "brown"
    names[~colored & (value > 205)] = "white"
    names[value < 45] = "black"
    words, counts = np.unique(names.astype(str), return_counts=True)
    return str(words[counts.argmax()])


def brightness(crop: Crop) -> str:
    """`bright`, `medium` or `dark`, by the mean of the crop's luma."""
    luma = np.asarray(render(crop).convert("L").resize((32, 32))).mean()
    return "bright" if luma > 150 else "dark" if luma < 80 else "medium"


def orientation(crop: Crop) -> str:
    """`wide`, `tall` or `square`."""
    # Between the bounds nobody would call it wide or tall.
    ratio = crop.size[0] / crop.size[1]
    return "wide" if ratio > 1.15 else "tall" if ratio < 1 / 1.15 else "square"


def box_around(photo: str, center: tuple[float, float], width: float, height: float) -> tuple[int, int, int, int]:
    """Returns a box moved and shrunk to lie inside a photograph.

    Args:
        photo: which one; all have `SIZE`.
        center: (x, y) that the box is to lie around, in pixels.
        width: of the box in pixels, at most the photograph's.
        height: likewise.

    Returns:
        Left, top, right and bottom.
    """
    # Shrunk to the photograph, then moved inside it.
    width, height = round(min(width, SIZE[0])), round(min(height, SIZE[1]))
    left = round(min(max(center[0] - width / 2, 0), SIZE[0] - width))
    top = round(min(max(center[1] - height / 2, 0), SIZE[1] - height))
    return left, top, left + width, top + height


def part_center(rng: random.Random, photo: str, part: str) -> tuple[float, float]:
    """Returns the place (x, y) of a random pixel of a part."""
    pixels = _part_pixels(photo, part)
    row, column = divmod(int(pixels[rng.randrange(len(pixels))]), SIZE[0])
    return float(column), float(row)


def overlap(one: Crop, other: Crop) -> float:
    """Returns the area that two crops of one photograph share, of the area that they cover together (0-1)."""
    if one.photo != other.photo:
        return 0.0
    area = lambda box: max(0, box[2] - box[0]) * max(0, box[3] - box[1])  # noqa: E731
    a, b = one.box, other.box
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (area(a) + area(b) - shared)


def random_crop(rng: random.Random, photo: str, *, gray_share: float = 0.1) -> Crop:
    """Draws a crop around a random part in which something can be named; 56-300 pixels a side when saved."""
    # Drawn until something can be named and the saved size is in range.
    while True:
        part = rng.choice(list(OUTLINES[photo]))
        aspect = rng.choice([0.6, 0.75, 1.0, 1.0, 4 / 3, 1.5, 1.8])
        height = rng.uniform(90, 420)
        box = box_around(photo, part_center(rng, photo, part), height * aspect, height)
        aspect = (box[2] - box[0]) / (box[3] - box[1])
        short = rng.randrange(56, 169)
        size = (round(short * aspect), short) if aspect >= 1 else (short, round(short / aspect))
        crop = Crop(photo, box, size, mirrored=rng.random() < 0.3, gray=rng.random() < gray_share)
        if max(size) <= 300 and visible_parts(crop):
            return crop
