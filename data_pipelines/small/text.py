"""Plain text: counting, the order of numbers, facts (sums among them), short stories; and questions about them."""

import random
from collections.abc import Iterator
from itertools import product

from data_pipelines.small.pictures import COLORS, SHAPES
from data_pipelines.small.words import NUMBERS, Ability, Question, is_held_out

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("long", "short"), ("up", "down"), ("left", "right")),
    *(("day", "night"), ("old", "new"), ("open", "closed"), ("light", "dark"), ("happy", "sad"), ("top", "bottom")),
)
COLORS_OF = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "the sun": "yellow",
    "blood": "red",
    "a leaf": "green",
    "milk": "white",
    "a banana": "yellow",
    "a tomato": "red",
    "the sea": "blue",
    "a plum": "purple",
    "a carrot": "orange",
    "the night": "black",
}
KINDS = {
    "animal": ("dog", "cat", "bird", "horse", "fish", "cow"),
    "fruit": ("banana", "plum", "pear", "peach", "cherry", "lemon"),
    "color": tuple(COLORS)[:6],
    "shape": SHAPES,
    "number": NUMBERS[1:7],
    "day": DAYS[:6],
}
PEOPLE = ("Anna", "Tom", "Mary", "Peter", "Lucy", "John")
THINGS = ("ball", "car", "book", "cup", "hat", "box")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def _facts() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Yields facts: statements of it, wordings of a question, the answer."""
    for one, other in [*OPPOSITES, *(pair[::-1] for pair in OPPOSITES)]:
        told = (f"The opposite of {one} is {other}.", f"{one.capitalize()} is the opposite of {other}.")
        yield told, (f"What is the opposite of {one}?", f"Name the opposite of {one}."), other
    for thing, color in COLORS_OF.items():
        told = (f"{thing.capitalize()} is {color}.", f"The color of {thing} is {color}.")
        yield told, (f"What color is {thing}?", f"What is the color of {thing}?"), color
    for index, day in enumerate(DAYS):
        after = DAYS[(index + 1) % 7]
        told = (f"After {day} comes {after}.", f"{after} is the day after {day}.")
        yield told, (f"Which day comes after {day}?", f"What day follows {day}?"), after
    for value in range(1, 10):
        word, after = NUMBERS[value], NUMBERS[value + 1]
        told = (f"After {word} comes {after}.", f"{after.capitalize()} is one more than {word}.")
        yield told, (f"Which number comes after {word}?", f"What number follows {word}?"), after
    for a, b in product(range(1, 7), repeat=2):
        added, total = f"{NUMBERS[a]} plus {NUMBERS[b]}", NUMBERS[a + b]
        told = (f"{added.capitalize()} is {total}.", f"{added.capitalize()} makes {total}.")
        yield told, (f"How much is {added}?", f"What is {added}?"), total
    for kind, nouns in KINDS.items():
        for noun in nouns:
            thing = _a(noun) if kind in ("animal", "fruit", "shape") else noun
            told = (f"{thing.capitalize()} is {_a(kind)}.", f"One {kind} is {thing}.")
            yield told, (f"What is {thing}?", f"What kind of thing is {thing}?"), _a(kind)


FACTS = tuple(_facts())
_ORDER = ("Which is more, {a} or {b}?", "Which number is larger, {a} or {b}?")


def question(rng: random.Random, ability: Ability, *, held_out: bool = False) -> Question:
    """Asks a question of one of the abilities of text, that is trained on or held out.

    Args:
        rng: decides which.
        ability: `count`, `order`, `facts` or `reading`.
        held_out: whether the combination that is asked for is one that no training document has.
    """
    return rng.choice(_ALL[ability][held_out]) if ability != "reading" else _reading(rng, held_out)[1]


def _count() -> Iterator[tuple[bool, Question]]:
    # A full stop ends the list, so that none is the beginning of a longer one.
    for first, more in product(range(10), range(2, 7)):
        asked = f"Count from {NUMBERS[first]} to {NUMBERS[first + more]}."
        yield is_held_out(first, more, one_in=6), Question(asked, ", ".join(NUMBERS[first : first + more + 1]) + ".")


def _order() -> Iterator[tuple[bool, Question]]:
    # By a weighted sum: with "two or five" held out, "five or two" is still trained on.
    for a, b in product(range(1, 11), repeat=2):
        for wording in _ORDER if a != b else ():
            asked = wording.format(a=NUMBERS[a], b=NUMBERS[b])
            yield is_held_out(2 * a, b, one_in=7), Question(asked, NUMBERS[max(a, b)])


def _fact_questions() -> Iterator[tuple[bool, Question]]:
    # Of every second fact one wording of the question is held out; the fact is told, and asked in the other wording.
    for index, (_, wordings, answer) in enumerate(FACTS):
        for number, wording in enumerate(wordings):
            yield is_held_out(index // 2, number, one_in=4), Question(wording, answer)


def _split(pairs: Iterator[tuple[bool, Question]]) -> dict[bool, list[Question]]:
    parts: dict[bool, list[Question]] = {False: [], True: []}
    for held, pair in pairs:
        parts[held].append(pair)
    return parts


_ALL: dict[Ability, dict[bool, list[Question]]] = {
    "count": _split(_count()),
    "order": _split(_order()),
    "facts": _split(_fact_questions()),
}
TEXT_ABILITIES: tuple[Ability, ...] = (*_ALL, "reading")


def _reading(rng: random.Random, held_out: bool) -> tuple[str, Question]:
    """Tells who has what, and asks about one of them: a person, a color and a thing that never were together."""
    # No training story tells of an owner that is held out; a held-out question asks about one.
    while True:
        people, things, colors = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2), rng.sample(list(COLORS), 2)
        asked = rng.randrange(2)
        new = [
            is_held_out(PEOPLE.index(person), THINGS.index(thing), list(COLORS).index(color))
            for person, thing, color in zip(people, things, colors, strict=True)
        ]
        if new[asked] if held_out else not any(new):
            break
    has = [f"{person} has {_a(color)} {thing}." for person, color, thing in zip(people, colors, things, strict=True)]
    story = " ".join(has)
    question, answer = rng.choice(
        [
            (f"Who has the {things[asked]}?", people[asked]),
            (f"What does {people[asked]} have?", f"{_a(colors[asked])} {things[asked]}"),
            (f"What color is the {things[asked]}?", colors[asked]),
        ]
    )
    return story, Question(f"{story} {question}", answer)


def passage(rng: random.Random) -> str:
    """Writes facts, in two to four sentences, or a story. No owner that is held out is told of."""
    if rng.random() < 0.3:
        return _reading(rng, False)[0]
    return " ".join(rng.choice(told) for told, _, _ in rng.sample(FACTS, rng.randrange(2, 5)))
