"""Handwritten digits: the 1,797 images of 8x8 pixels that ship in scikit-learn, enlarged."""

import functools
import gzip
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.small.words import NUMBERS, Ability, Question, ask

TRAINING = 1297  # the first so many images train, the other 500 are held out
SIDE = 56  # pixels of an enlarged image: four visual tokens
_QUESTIONS = ("Which digit is this?", "What number is it?", "Read the digit.")


@dataclass(frozen=True)
class Digit:
    """One of the images, and how it is shown: moved by so many pixels (x, y), white on black or black on white."""

    number: int
    moved: tuple[int, int] = (0, 0)
    inverted: bool = False

    @property
    def value(self) -> int:
        """Returns the digit that was written, 0 to 9."""
        return int(_table()[1][self.number])

    def render(self) -> Image.Image:
        """Draws the image, RGB of `SIDE` pixels a side."""
        # 16 levels of gray; enlarged smoothly, so that strokes stay strokes.
        strokes = _table()[0][self.number].astype(np.float32) * (255 / 16)
        image = Image.fromarray(strokes.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(image, self.moved)
        if self.inverted:
            canvas = canvas.point(lambda level: 255 - level)
        return canvas.convert("RGB")

    def questions(self, rng: random.Random) -> dict[Ability, Question]:
        """Returns the question about it."""
        return {"digit": ask(rng, _QUESTIONS, NUMBERS[self.value])}

    def caption(self, rng: random.Random) -> str:
        """Describes it in a few words."""
        return rng.choice(["The digit {}.", "A handwritten {}."]).format(NUMBERS[self.value])


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Reads the images, uint8 (1797, 8, 8) of levels 0 to 16, and their digits. Raises ConfigError without the file."""
    # Found by path: importing scikit-learn (and SciPy with it) to open a file would cost seconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the handwritten digits come with scikit-learn: pip install baichuan_omni_jax[sample]")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"scikit-learn is installed but its digits {path} cannot be read: {error}") from error
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def training_digits(rng: random.Random, copies: int) -> list[Digit]:
    """Returns every training image `copies` times: once as it is, then moved by a little, some inverted."""
    plain = [Digit(number) for number in range(TRAINING)]
    moved = [
        Digit(number, (rng.randint(-4, 4), rng.randint(-4, 4)), rng.random() < 0.3)
        for _ in range(copies - 1)
        for number in range(TRAINING)
    ]
    return plain + moved


def held_out_digits() -> list[Digit]:
    """Returns the images that no training document shows."""
    return [Digit(number) for number in range(TRAINING, len(_table()[1]))]
