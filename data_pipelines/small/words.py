"""What all parts of the data set share: abilities, questions, numbers in words, which combinations are held out."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

Ability = Literal[
    "digit",
    "color",
    "shape",
    "place",
    "tallest_bar",
    "bar_value",
    "motion",
    "first_place",
    "last_place",
    "count",
    "order",
    "facts",
    "reading",
]
"""What is asked for. All but the places of videos have held-out questions, `held_out/ABILITY.jsonl`."""

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)


class Question(NamedTuple):
    """A question in words and its answer, of one or two words."""

    question: str
    answer: str


def ask(rng: random.Random, wordings: Sequence[str], answer: str, **slots: str) -> Question:
    """Asks in one of several wordings, in which `{name}` stands for a slot's value."""
    return Question(rng.choice(wordings).format(**slots), answer)


def is_held_out(*indices: int, one_in: int = 12) -> bool:
    """Tells whether a combination is held out: one of `one_in`, by the sum of its parts' indices.

    Each part, and each pair of parts, is met in training with all others but these.
    """
    return sum(indices) % one_in == one_in - 1
