"""Short videos: one shape that moves from one side to the other."""

import random
from dataclasses import dataclass

import numpy as np

from data_pipelines.small.pictures import (
    COLORS,
    JITTER,
    SHAPES,
    SIDE,
    Background,
    Shape,
    place_center,
    random_background,
    random_shape,
)
from data_pipelines.small.words import Ability, Question, ask, is_held_out

SECONDS = 4
FRAME_RATE = 4
# Direction -> where the shape begins and ends, along one of three lines.
_PATHS: dict[str, list[tuple[str, str]]] = {
    "right": [("top left", "top right"), ("middle left", "middle right"), ("bottom left", "bottom right")],
    "left": [("top right", "top left"), ("middle right", "middle left"), ("bottom right", "bottom left")],
    "down": [("top left", "bottom left"), ("top middle", "bottom middle"), ("top right", "bottom right")],
    "up": [("bottom left", "top left"), ("bottom middle", "top middle"), ("bottom right", "top right")],
}
DIRECTIONS = tuple(_PATHS)
_MOTION_QUESTIONS = ("Where does it move?", "Which way does it go?", "Where does the shape go?")
_FIRST_QUESTIONS = ("Where is it first?", "Where does it start?")
_LAST_QUESTIONS = ("Where is it last?", "Where does it end?")
_COLOR_QUESTIONS = ("What color is it?", "Which color is the shape?")
_SHAPE_QUESTIONS = ("What shape is it?", "Which shape is this?")


@dataclass(frozen=True)
class Motion:
    """A shape that moves along one of the three lines (`path`) of a direction."""

    shape: Shape
    direction: str
    path: int
    offset: tuple[float, float]
    background: Background

    @property
    def places(self) -> tuple[str, str]:
        """Returns where the shape is first and last."""
        return _PATHS[self.direction][self.path]

    def frames(self) -> list[np.ndarray]:
        """Renders all frames, uint8 (`SIDE`, `SIDE`, 3)."""
        # All but the shape stands still, so it is drawn once.
        (x0, y0), (x1, y1) = map(place_center, self.places)
        background, count = self.background.render(SIDE), SECONDS * FRAME_RATE
        made = []
        for index in range(count):
            ratio, image = index / (count - 1), background.copy()
            center = (x0 + ratio * (x1 - x0) + self.offset[0], y0 + ratio * (y1 - y0) + self.offset[1])
            self.shape.draw(image, center)
            made.append(np.asarray(image))
        return made

    def questions(self, rng: random.Random) -> dict[Ability, Question]:
        """Returns a question for each thing that can be asked about it."""
        first, last = self.places
        return {
            "motion": ask(rng, _MOTION_QUESTIONS, self.direction),
            "first_place": ask(rng, _FIRST_QUESTIONS, first),
            "last_place": ask(rng, _LAST_QUESTIONS, last),
            "color": ask(rng, _COLOR_QUESTIONS, self.shape.color),
            "shape": ask(rng, _SHAPE_QUESTIONS, self.shape.shape),
        }

    def caption(self, rng: random.Random) -> str:
        """Describes it in a few words."""
        article = "An" if self.shape.color == "orange" else "A"
        side = f"to the {self.direction}" if self.direction in ("left", "right") else self.direction
        return f"{article} {self.shape.color} {self.shape.shape} moves {side}."


def random_motion(rng: random.Random, *, held_out: bool = False) -> Motion:
    """Draws a motion of a combination of color, shape, direction and line that is trained on, or held out."""
    # Drawn again until the combination is on the side that is asked for: one of twelve is held out.
    while True:
        color, shape = rng.randrange(len(COLORS)), rng.randrange(len(SHAPES))
        direction, path = rng.randrange(len(DIRECTIONS)), rng.randrange(3)
        if is_held_out(color, shape, direction, path) == held_out:
            break
    offset = (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
    drawn = random_shape(rng, list(COLORS)[color], SHAPES[shape])
    return Motion(drawn, DIRECTIONS[direction], path, offset, random_background(rng))
