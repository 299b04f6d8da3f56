"""Drawn pictures: one shape of a color at a place, on a plain background or on a photograph."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_pipelines.sample.photographs import PHOTOGRAPHS, box_around, photograph
from data_pipelines.sample.photographs import SIZE as PHOTO_SIZE
from data_pipelines.small.words import Ability, Question, ask, is_held_out

SIDE = 84  # pixels: nine visual tokens, one for each place
CELL = SIDE // 3
RADII = (11.0, 15.0)  # of shapes, in pixels
JITTER = 3.0  # pixels that a shape may be off the middle of its place

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (250, 145, 20),
    "yellow": (245, 230, 50),
    "green": (35, 165, 60),
    "blue": (40, 80, 225),
    "purple": (150, 55, 190),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# No name begins another: inside a conversation nothing is trained that would end the shorter one.
PLACES = (
    *("top left", "top middle", "top right"),
    *("middle left", "center", "middle right"),
    *("bottom left", "bottom middle", "bottom right"),
)

_COLOR_QUESTIONS = ("What color is it?", "Which color is the shape?", "Name the color.")
_SHAPE_QUESTIONS = ("What shape is it?", "Which shape is this?", "Name the shape.")
_PLACE_QUESTIONS = ("Where is it?", "Where is the shape?", "In which place is it?")
_SCALE = 4  # shapes are drawn larger and reduced, so that their edges are smooth


@dataclass(frozen=True)
class Shape:
    """A shape as it is drawn: names, its size in pixels and its turn in degrees; `shade` is added to its color."""

    color: str
    shape: str
    radius: float
    turn: float
    shade: tuple[int, int, int]

    def draw(self, image: Image.Image, center: tuple[float, float]) -> None:
        """Draws the shape around `center` (x, y)."""
        # A mask of the shape's own box, at whole pixels of the image: what is left of the center goes into the mask.
        reach = math.ceil(1.3 * self.radius) + 1
        left, top = (math.floor(where) - reach for where in center)
        mask = Image.new("L", (2 * reach * _SCALE, 2 * reach * _SCALE))
        _draw_mask(ImageDraw.Draw(mask), self, ((center[0] - left) * _SCALE, (center[1] - top) * _SCALE))
        mask = mask.resize((2 * reach, 2 * reach), Image.Resampling.BOX)
        color = tuple(min(255, max(0, level + add)) for level, add in zip(COLORS[self.color], self.shade, strict=True))
        image.paste(color, (left, top), mask)


def _draw_mask(draw: ImageDraw.ImageDraw, shape: Shape, center: tuple[float, float]) -> None:
    # Corners lie at angles from the top, as shares of the radius: those of a square reach out farther than a disc.
    radius = shape.radius * _SCALE

    def points(*polar: tuple[float, int]) -> list[tuple[float, float]]:
        turned = [(share * radius, math.radians(angle + shape.turn)) for share, angle in polar]
        return [(center[0] + far * math.sin(angle), center[1] - far * math.cos(angle)) for far, angle in turned]

    def disc(share: float) -> tuple[float, float, float, float]:
        far = share * radius
        return center[0] - far, center[1] - far, center[0] + far, center[1] + far

    if shape.shape in ("circle", "ring"):
        draw.ellipse(disc(1.0), fill=255)
        if shape.shape == "ring":
            draw.ellipse(disc(0.55), fill=0)
    elif shape.shape == "square":
        draw.polygon(points(*((1.15, angle) for angle in (45, 135, 225, 315))), fill=255)
    elif shape.shape == "triangle":
        draw.polygon(points(*((1.15, angle) for angle in (0, 120, 240))), fill=255)
    elif shape.shape == "star":
        draw.polygon(points(*((1.2 if step % 2 == 0 else 0.5, 36 * step) for step in range(10))), fill=255)
    else:
        # A cross: two bars, each a rectangle by its corners' angles.
        for quarter in (0, 90):
            draw.polygon(points(*((1.1, quarter + angle) for angle in (-18, 18, 162, 198))), fill=255)


def random_shape(rng: random.Random, color: str, shape: str) -> Shape:
    """Draws size, turn and shade of a shape."""
    shade = (rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14))
    return Shape(color, shape, rng.uniform(*RADII), rng.uniform(-8, 8), shade)


@dataclass(frozen=True)
class Background:
    """A plain gray, or a piece of a photograph (its box) that is paled so that shapes stand out."""

    gray: int
    photo: str = ""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    def render(self, side: int) -> Image.Image:
        """Draws it, RGB of `side` pixels a side."""
        plain = Image.new("RGB", (side, side), (self.gray,) * 3)
        if not self.photo:
            return plain
        # Without colors: the only color in sight is the shape's.
        piece = photograph(self.photo).resize((side, side), Image.Resampling.BILINEAR, box=self.box, reducing_gap=2.0)
        return Image.blend(piece.convert("L").convert("RGB"), plain, 0.6)


def random_background(rng: random.Random, photo_share: float = 0.3) -> Background:
    """Draws a background: grays between the white and the black of shapes."""
    # Never as light as the white shapes, nor as dark as the black ones.
    gray = rng.randint(90, 175)
    if rng.random() >= photo_share:
        return Background(gray)
    photo, side = rng.choice(PHOTOGRAPHS), rng.uniform(100, 300)
    center = (rng.uniform(0, PHOTO_SIZE[0]), rng.uniform(0, PHOTO_SIZE[1]))
    return Background(gray, photo, box_around(photo, center, side, side))


def place_center(place: str) -> tuple[float, float]:
    """Returns the middle (x, y) of one of the nine places."""
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) * CELL, (row + 0.5) * CELL


@dataclass(frozen=True)
class Picture:
    """One shape at a place, its center off the middle of the place by `offset`."""

    shape: Shape
    place: str
    offset: tuple[float, float]
    background: Background

    def render(self) -> Image.Image:
        """Draws the picture, RGB of `SIDE` pixels a side."""
        image = self.background.render(SIDE)
        x, y = place_center(self.place)
        self.shape.draw(image, (x + self.offset[0], y + self.offset[1]))
        return image

    def questions(self, rng: random.Random) -> dict[Ability, Question]:
        """Returns a question for each thing that can be asked about it."""
        return {
            "color": ask(rng, _COLOR_QUESTIONS, self.shape.color),
            "shape": ask(rng, _SHAPE_QUESTIONS, self.shape.shape),
            "place": ask(rng, _PLACE_QUESTIONS, self.place),
        }

    def caption(self, rng: random.Random) -> str:
        """Describes it in a few words."""
        what, where = f"{self.shape.color} {self.shape.shape}", f"at the {self.place}"
        article = "an" if self.shape.color == "orange" else "a"
        first = f"{article.capitalize()} {what} {where}."
        return rng.choice([first, first, f"The {self.shape.shape} {where} is {self.shape.color}."])


def random_picture(rng: random.Random, *, held_out: bool = False) -> Picture:
    """Draws a picture of a combination of color, shape and place that is trained on, or of one that is held out."""
    while True:
        color, shape, place = rng.randrange(len(COLORS)), rng.randrange(len(SHAPES)), rng.randrange(len(PLACES))
        if is_held_out(color, shape, place) == held_out:
            break
    offset = (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
    drawn = random_shape(rng, list(COLORS)[color], SHAPES[shape])
    return Picture(drawn, PLACES[place], offset, random_background(rng))
