"""Rules that score answers, and what is said of many: means, error rates, intervals.

Text is compared as others compare it, so that figures compare with theirs: Whisper's English normalizer and then its
basic one, words; Chinese numbers written out and the basic normalizer, characters; edits summed over the corpus.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
from jaxtyping import Float

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.items import LETTERS
from data_pipelines.synthesis.filters.rules import count_edits

RESAMPLES = 1000
Language = Literal["en", "zh"]


# Words that announce a choice. The letter may stand in brackets or in Markdown's stars.
_ANNOUNCED = r"(?:answer|choice|option|答案|选项|选择|应选|故选|选)[\s:*]*(?:is|为|是)?[\s:*(\[]*"


def choice_letter(answer: str, options: Sequence[str]) -> str | None:
    """Finds the letter that an answer chooses; None where it chooses none, or several.

    In this order: the letter that it announces last ("The answer is B", "答案：B"), the one that it begins with
    ("B. Two", "(B)"), the only one that stands by itself, the only option whose text it holds.

    >>> [choice_letter(text, ("one", "two")) for text in ("B. Two", "It is two.", "A or B")]
    ['B', 'B', None]
    """
    letters = LETTERS[: len(options)]
    if not letters:
        return None
    text = unicodedata.normalize("NFKC", answer).strip(" \n\t*_`\"'")
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    # The last, as an answer may reason before it decides.
    if announced := re.findall(rf"(?i:{_ANNOUNCED})([{letters}])(?![A-Za-z])", text):
        return announced[-1]
    if first := re.match(rf"[(\[]?([{letters}])\**[)\].:、\n]", text):
        return first[1]
    # "A" before a small letter is an article, "I" before one a pronoun.
    apart = set(re.findall(rf"(?<![A-Za-z'])(?!A (?!or|and|is)[a-z]|I [a-z'])[{letters}](?![A-Za-z'])", text))
    if apart:
        return apart.pop() if len(apart) == 1 else None
    return _holds_one(text, options)


def _holds_one(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text is in `text`; of several, one that holds all the others."""
    # Compared without case, punctuation and articles, as whole words.
    plain = plain_words(text)
    held = [n for n, option in enumerate(options) if plain_words(option) and _is_in(plain_words(option), plain)]
    # "twelve" in "twenty-twelve" aside, an option may hold another: the longest counts.
    longest = max(held, key=lambda n: len(options[n]), default=None)
    if longest is None or any(plain_words(options[n]) not in plain_words(options[longest]) for n in held):
        return None
    return LETTERS[longest]


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references, but for case, punctuation, articles and white space."""
    return plain_words(answer) in map(plain_words, references)


def contains_match(answer: str, references: Sequence[str]) -> bool:
    """Whether one of the references stands in the answer, as whole words.

    >>> contains_match("It was Paris, of course.", ["paris"]), contains_match("Parisian", ["paris"])
    (True, False)
    """
    return any(plain_words(text) and _is_in(plain_words(text), plain_words(answer)) for text in references)


def plain_words(text: str, articles: bool = False) -> str:
    """Returns small letters and digits, single spaces; articles only where they are asked for."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower().replace("'", ""))
    return " ".join(word for word in words if articles or word not in ("a", "an", "the"))


def _is_in(part: str, whole: str) -> bool:
    # Chinese has no spaces between words.
    if not part.isascii():
        return part.replace(" ", "") in whole.replace(" ", "")
    return f" {part} " in f" {whole} "


def normalize_text(text: str, language: Language) -> str:
    """Makes text comparable: for "en" words apart by spaces, for "zh" characters apart by nothing.

    Raises ConfigError where the libraries of the extra `evaluate` are missing.
    """
    english, basic = _normalizers()
    plain = text if language == "en" else unicodedata.normalize("NFKC", text)
    # Neither library documents what it raises of numbers that nobody reads out, such as 40 digits in a row: those stay.
    try:
        if language == "en":
            written = english(plain)
        else:
            import cn2an

            # Digits as they are read, so that 35% and 百分之三十五 are one; then punctuation away.
            written = cn2an.transform(plain, "an2cn")
    except Exception:
        written = plain
    return basic(written).strip() if language == "en" else re.sub(r"\s+", "", basic(written))


@lru_cache(maxsize=1)
def _normalizers():
    if missing := [name for name in ("whisper_normalizer", "jiwer", "cn2an") if find_spec(name) is None]:
        raise ConfigError(f"error rates need {missing[0]}: pip install '.[evaluate]'")
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer(), BasicTextNormalizer()


def count_errors(answer: str, spoken: str, language: Language) -> tuple[int, int]:
    """Counts edits from what was spoken to the answer, and the units (words, or Chinese characters) that were spoken.

    Raises ConfigError as `normalize_text`.
    """
    truth, heard = normalize_text(spoken, language), normalize_text(answer, language)
    import jiwer

    # Nothing was said: all that was heard is too much, and jiwer would refuse to divide.
    if not truth:
        return len(heard.split() if language == "en" else heard), 0
    process = jiwer.process_words if language == "en" else jiwer.process_characters
    found = process([truth], [heard])
    return found.substitutions + found.deletions + found.insertions, found.hits + found.substitutions + found.deletions


def count_plain_errors(answer: str, spoken: str, unit: Literal["characters", "words"]) -> tuple[int, int]:
    """Counts edits from what was spoken to the answer, and the units that were spoken: case and punctuation aside.

    Needs no package beside this one. Published rates are of other rules (`count_errors`).

    >>> count_plain_errors("he say", "He says.", "characters"), count_plain_errors("he say", "He says.", "words")
    ((1, 7), (1, 2))
    """
    truth, heard = plain_words(spoken, articles=True), plain_words(answer, articles=True)
    if unit == "words":
        return count_edits(heard.split(), truth.split()), len(truth.split())
    return count_edits(heard, truth), len(truth)


@dataclass
class ItemScore:
    """What one answer got: `got` of `of`; a rate sums both over items. `invalid`: it counts as wrong, being no answer
    at all; `problem`: it is left out of the score, and why.
    """

    group: str
    got: float | int = 0.0
    of: float | int = 1.0
    invalid: bool = False
    problem: str = ""


@dataclass(frozen=True)
class GroupScore:
    """The score of a group, or of a whole suite.

    Attributes:
        name: the group's, or "all".
        items: how many count.
        value: percent: right answers, points, or errors over units.
        low, high: the interval that holds 95 % of resampled scores.
        invalid: answers that are none and count as wrong.
        problems: items that are left out, by why.
    """

    name: str
    items: int
    value: float | None
    low: float | None
    high: float | None
    invalid: int = 0
    problems: Mapping[str, int] = field(default_factory=dict)


def score_groups(scores: Sequence[ItemScore], average: Literal["items", "groups"] = "items") -> list[GroupScore]:
    """Scores each group, and all; with `average` "groups" all is the mean of the groups, each resampled by itself."""
    groups: dict[str, list[ItemScore]] = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score)
    # Each group is resampled once, for its own interval and for that of the mean.
    made = {name: _resampled(members) for name, members in groups.items()}
    found = [_group_score(name, members, *made[name]) for name, members in groups.items()]
    # The mean of groups of unequal size: resampling all items together would let large groups weigh more.
    if average == "groups":
        counted = [made[name] for name in groups if made[name][0] is not None]
        values = [value for value, _ in counted if value is not None]
        mean = float(np.mean(values)) if values else None
        whole = mean, np.mean([draws for _, draws in counted], axis=0) if values else np.zeros(0)
    else:
        whole = _resampled(scores)
    # Items whose row does not tell a group count in the whole alone.
    return [_group_score("all", scores, *whole), *(group for group in found if group.name != "all")]


def resample(got: Sequence[float | int], of: Sequence[float | int]) -> Float[np.ndarray, " r"]:
    """Returns sums of `got` over sums of `of` in `RESAMPLES` resamples of the items, with replacement; the seed is
    fixed.
    """
    parts, units = np.asarray(got, float), np.asarray(of, float)
    rng, draws = np.random.default_rng(0), np.empty(RESAMPLES)
    # One resample at a time: all at once would be items x resamples numbers.
    for n in range(RESAMPLES):
        chosen = rng.integers(0, len(units), len(units))
        draws[n] = parts[chosen].sum() / max(units[chosen].sum(), 1e-9)
    return draws


def interval(draws: Float[np.ndarray, " r"]) -> tuple[float, float]:
    """Returns the bounds of the middle 95 %."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _resampled(scores: Sequence[ItemScore]) -> tuple[float | None, Float[np.ndarray, " r"]]:
    """The score in percent, None where nothing counts, and those of resamples."""
    counted = [score for score in scores if not score.problem]
    got, of = [score.got for score in counted], [score.of for score in counted]
    if not sum(of):
        return None, np.zeros(0)
    return 100 * sum(got) / sum(of), 100 * resample(got, of)


def _group_score(
    name: str, scores: Sequence[ItemScore], value: float | None, draws: Float[np.ndarray, " r"]
) -> GroupScore:
    low, high = interval(draws) if len(draws) else (None, None)
    problems: dict[str, int] = {}
    for score in scores:
        if score.problem:
            problems[score.problem] = problems.get(score.problem, 0) + 1
    invalid = sum(score.invalid for score in scores)
    return GroupScore(name, sum(not score.problem for score in scores), value, low, high, invalid, problems)
