"""What is said in the small recipe's data, and by whom: single words, strings of digits, sentences of 80 words.

Held-out clips are of voices that no training clip has, and say what no training clip says.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE, speak

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m6", "m8", "f1", "f2", "f3", "f4"),
    *("Alex", "Alicia", "Andrea", "Andy", "Denis", "Jacky", "Lee", "Michael", "Mike", "Reed", "belinda"),
    *("david", "ed", "edward", "ian", "john", "max", "paul", "rob", "sandro", "shelby", "zac"),
)
"""eSpeak's variants of a voice that training hears, the plain accent aside; no robots and no whispering."""
NEW_VARIANTS = ("m5", "m7", "f5", "linda", "steph", "adam")
"""Variants that are heard in held-out clips alone."""
ANSWERS = ("en-us+f2", 150, 50)
"""The voice, rate and pitch that the model speaks in: one, as a prompt of text does not choose among several."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PEOPLE = ("dog", "cat", "bird", "horse", "boy", "girl", "man", "woman", "teacher", "doctor", "king", "farmer", "baby")
_KINDS = ("big", "small", "old", "young", "happy", "tired")
_DOES = ("sees", "likes", "finds", "takes", "wants", "follows", "hears", "paints", "calls", "opens")
_COLORS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
_THINGS = ("ball", "box", "book", "tree", "house", "car", "hat", "apple", "flower", "chair", "table", "door", "boat")
_WHERE = ("near", "under", "behind", "in", "with")
_PLACES = ("garden", "kitchen", "river", "school", "city", "forest", "street", "market")
_TIMES = ("today", "now", "again", "tonight", "tomorrow")

VOCABULARY = (*_PEOPLE, *_KINDS, *_DOES, *_COLORS, *_THINGS, *_WHERE, *_PLACES, *_TIMES, *NUMBERS)


@dataclass(frozen=True)
class Clip:
    """Words to be spoken, and by whom."""

    text: str
    voice: str
    rate: int
    pitch: int

    def record(self, path: Path) -> None:
        """Speaks it into a file."""
        soundfile.write(path, speak(self.text, self.voice, rate=self.rate, pitch=self.pitch), SAMPLE_RATE)


def digits(rng: random.Random) -> str:
    """Draws a string of two to five digits, in words."""
    return " ".join(rng.choice(NUMBERS) for _ in range(rng.randint(2, 5)))


def sentence(rng: random.Random) -> str:
    """Draws a sentence of five to eleven words."""
    # Who, how they are, what they do, to what, and of which color.
    words = ["the", *rng.sample(_KINDS, rng.randint(0, 1)), rng.choice(_PEOPLE), rng.choice(_DOES)]
    words += [rng.choice(["the", "a"]), *rng.sample(_COLORS, rng.randint(0, 1)), rng.choice(_THINGS)]
    # A place, a time, both or neither.
    if rng.random() < 0.6:
        words += [rng.choice(_WHERE), "the", rng.choice(_PLACES)]
    if rng.random() < 0.4:
        words.append(rng.choice(_TIMES))
    return re.sub(r"\ba (?=[ao])", "an ", " ".join(words))


def words(rng: random.Random) -> str:
    """Draws one to three words of the vocabulary, in no order: what a reader learns first."""
    return " ".join(rng.sample(VOCABULARY, rng.randint(1, 3)))


def phrase(rng: random.Random) -> str:
    """Draws one to three words that follow each other in a sentence: what a piece of speech says."""
    said, count = sentence(rng).split(), rng.randint(1, 3)
    first = rng.randint(0, len(said) - count)
    return " ".join(said[first : first + count])


def voice(rng: random.Random, new: bool) -> tuple[str, int, int]:
    """Draws who speaks: voice, words a minute, pitch; `new` voices are those of held-out clips."""
    # Accents are shared: what is new is the voice that has one.
    variants: Sequence[str] = NEW_VARIANTS if new else ("", *VARIANTS)
    accent, variant = rng.choice(ACCENTS), rng.choice(variants)
    return f"{accent}+{variant}" if variant else accent, rng.randint(140, 200), rng.randint(30, 70)


def distinct(draw: Callable[[random.Random], str], rng: random.Random, count: int, known: set[str]) -> list[str]:
    """Draws `count` texts that differ from one another and from all `known`, and adds them to those."""
    drawn: list[str] = []
    while len(drawn) < count:
        text = draw(rng)
        if text not in known:
            known.add(text)
            drawn.append(text)
    return drawn
