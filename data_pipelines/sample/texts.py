"""Sentences, paragraphs and questions made from the phrase tables, always as an (English, Chinese) pair."""

import random

from data_pipelines.sample.phrases import FACTS, NUMBERS, OPPOSITES, SLOTS, TOPICS

Pair = tuple[str, str]
"""The same text in English and in Chinese."""


def _fill(rng: random.Random, template: Pair) -> Pair:
    """Gives every slot one value, the same in both languages; `{Friend}` is `{friend}` with a capital letter."""
    english, chinese = template
    for name, values in SLOTS.items():
        first, second = rng.sample(values, 2)
        english = english.replace("{" + name + "}", first[0]).replace("{" + name + "2}", second[0])
        english = english.replace("{" + name.capitalize() + "}", first[0][:1].upper() + first[0][1:])
        chinese = chinese.replace("{" + name + "}", first[1]).replace("{" + name + "2}", second[1])
    return english, chinese


def sentence(rng: random.Random) -> Pair:
    """One sentence of any topic: 1.5-5 s when spoken."""
    return _fill(rng, rng.choice(TOPICS[rng.choice(list(TOPICS))]))


def sentences(rng: random.Random, count: int) -> list[Pair]:
    """`count` different sentences of one topic, in the order of its table, which reads as a small story."""
    templates = TOPICS[rng.choice(list(TOPICS))]
    return [_fill(rng, templates[index]) for index in sorted(rng.sample(range(len(templates)), count))]


def join(texts: list[str], language: str) -> str:
    """Sentences as running text: a space between English ones, none between Chinese ones."""
    return (" " if language == "en" else "").join(texts)


def paragraph(rng: random.Random, language: str) -> str:
    """A text document: a story, sums, or questions with answers; 60-400 characters."""
    index = ("en", "zh").index(language)
    kind = rng.choice(["story", "story", "story", "sums", "questions"])
    if kind == "story":
        pairs = sentences(rng, rng.randrange(5, 8)) + sentences(rng, rng.randrange(2, 5))
        return join([pair[index] for pair in pairs], language)
    if kind == "sums":
        return join([_sum(rng)[index] for _ in range(rng.randrange(5, 9))], language)
    dialogues = [dialogue(rng)[index] for _ in range(rng.randrange(3, 6))]
    asks, answers = ("Question: ", "Answer: ") if language == "en" else ("问：", "答：")
    return "\n".join(f"{asks}{question}\n{answers}{answer}" for question, answer in dialogues)


def _sum(rng: random.Random) -> Pair:
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    left, right, total = NUMBERS[a - 1], NUMBERS[b - 1], NUMBERS[a + b - 1]
    return f"{left[0].capitalize()} plus {right[0]} is {total[0]}.", f"{left[1]}加{right[1]}等于{total[1]}。"


def dialogue(rng: random.Random) -> tuple[Pair, Pair]:
    """((English question, its answer), (Chinese question, its answer)); the answer is true and short."""
    kind = rng.choice(["sum", "day", "opposite", "fact", "fact"])
    if kind == "fact":
        return rng.choice(FACTS)
    if kind == "sum":
        a, b = rng.randrange(1, 10), rng.randrange(1, 10)
        x, y, total = NUMBERS[a - 1], NUMBERS[b - 1], NUMBERS[a + b - 1]
        english = (f"How much is {x[0]} plus {y[0]}?", f"{x[0].capitalize()} plus {y[0]} is {total[0]}.")
        return english, (f"{x[1]}加{y[1]}等于多少？", f"{x[1]}加{y[1]}等于{total[1]}。")
    if kind == "day":
        index = rng.randrange(7)
        today, after = SLOTS["day"][index], SLOTS["day"][(index + 1) % 7]
        english = (f"Which day comes after {today[0]}?", f"After {today[0]} comes {after[0]}.")
        return english, (f"{today[1]}的后一天是星期几？", f"{today[1]}的后一天是{after[1]}。")
    words = list(rng.choice(OPPOSITES))
    rng.shuffle(words)
    word, other = words
    english = (f"What is the opposite of {word[0]}?", f"The opposite of {word[0]} is {other[0]}.")
    return english, (f"{word[1]}的反义词是什么？", f"{word[1]}的反义词是{other[1]}。")
