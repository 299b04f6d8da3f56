"""Abilities: what weights in training can do with held-out documents, beside what can be done without looking.

A held-out document is a question (`data_pipelines.documents.questions`): what stands before its first trainable part is
the prompt, that part the reference. Answers are greedy and scored by what the reference is:

    accuracy   text: the answer is the reference, but for case, punctuation, articles and white space
    cer, wer   text of a recording or a page: edits of characters, and of words where the reference has spaces
    cer        speech: its code frames are put back as the audio of the recognition prompt, the model hears itself

Chance is what is reached without the media (docs/decisions/0104). Of accuracy: each written prompt's most frequent
reference as the answer to all its items; prompts that come once, or show nothing, share one answer. Of error rates:
other items' references as the answers, or none at all.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int32
from rich.table import Table

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.evaluation.suites.scoring import (
    count_plain_errors,
    exact_match,
    interval,
    plain_words,
    resample,
)
from baichuan_omni_jax.generation.events import GenerationResult, Prompt

TRANSCRIPTIONS = ("asr", "ocr")  # types of documents whose reference is what is said, or what is written
_OTHERS = 8  # references of others that a chance error rate takes, of each item
_BEYOND = 8  # tokens or frames that an answer may have beyond twice the longest reference

Kind = Literal["exact", "transcription", "speech"]


@runtime_checkable
class Question(Protocol):
    """One held-out document as a question; `data_pipelines.documents.questions.Question` is one."""

    @property
    def location(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def asked(self) -> str: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def reference(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def frames(self) -> int: ...


@runtime_checkable
class Engine(Protocol):
    """What answers: `generation.engine.Engine`. `submit` raises RequestError for a prompt that it cannot serve."""

    def submit(self, prompt: Prompt, settings: GenerationConfig, key: Any) -> Any: ...


Recognition = Callable[[Int32[np.ndarray, "n q"]], Prompt]


@dataclass(frozen=True)
class Answer:
    """The answer to a question: its text, or what the model hears in its speech; or the cause why there is none.

    `speech` has the code frames (n, q) of each piece of it.
    """

    text: str = ""
    frames: int = 0
    problem: str = ""
    speech: tuple[Int32[np.ndarray, "_ q"], ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class AbilityScore:
    """The score of one ability.

    Attributes:
        kind: how answers are scored.
        items: how many count.
        score: the share of right answers, or edits over characters.
        low, high: the interval that holds 95 % of resampled scores.
        chance: what is reached without the media, on the same scale.
        wer: edits over words, of references with spaces; None without any.
        left_out: documents that could not be asked, by cause.
        media_gain: what the own media save of the loss, nats per text target; None where it was not measured.
    """

    kind: Kind
    items: int
    score: float
    low: float
    high: float
    chance: float
    wer: float | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    media_gain: float | None = None

    @property
    def name(self) -> str:
        """What the score is called."""
        return "accuracy" if self.kind == "exact" else "cer"

    @property
    def beyond_chance(self) -> bool:
        """Whether the whole interval is better than chance."""
        return self.low > self.chance if self.kind == "exact" else self.high < self.chance

    def metrics(self) -> dict[str, float]:
        """Returns the numbers by the keys of a run's metrics."""
        found = {self.name: self.score, "chance": self.chance, "items": self.items}
        return found | ({} if self.wer is None else {"wer": self.wer})

    def as_json(self) -> dict[str, Any]:
        """Returns all of it, with the score under its name."""
        fields = {name: value for name, value in asdict(self).items() if name != "score" and value is not None}
        return {self.name: self.score, **fields, "left_out": dict(self.left_out), "beyond_chance": self.beyond_chance}


def ask(
    engine: Engine, abilities: Mapping[str, Sequence[Question]], recognition: Mapping[str, Recognition]
) -> dict[str, list[Answer]]:
    """Asks all questions of all abilities, many at a time.

    Args:
        engine: what answers.
        abilities: questions by ability.
        recognition: by ability, what encodes the request to transcribe code frames.

    Returns:
        The answers of each ability, in the order of its questions.
    """
    asked = [(name, question) for name, questions in abilities.items() for question in questions]
    limits = {name: answer_limits(questions) for name, questions in abilities.items()}
    results = _generate(engine, [(question.prompt, limits[name]) for name, question in asked])
    spoken = {
        n: (name, result)
        for n, ((name, question), result) in enumerate(zip(asked, results, strict=True))
        if question.frames and isinstance(result, GenerationResult)
    }
    heard = _hear(engine, spoken, recognition, limits)

    answers: dict[str, list[Answer]] = {name: [] for name in abilities}
    for n, ((name, _), result) in enumerate(zip(asked, results, strict=True)):
        if isinstance(result, RequestError):
            answers[name].append(Answer(problem=result.cause))
        else:
            answers[name].append(heard[n] if n in heard else Answer(result.text))
    return answers


def _hear(
    engine: Engine,
    spoken: Mapping[int, tuple[str, GenerationResult]],
    recognition: Mapping[str, Recognition],
    limits: Mapping[str, GenerationConfig],
) -> dict[int, Answer]:
    """Lets the model transcribe its own speech, of (ability, answer) by number: a second round of questions."""
    # Each piece alone, as each recording that the model learned to hear is: what is put together has pauses.
    pieces = [(n, name, codes) for n, (name, result) in spoken.items() for codes in result.speech if len(codes)]
    asked = [(recognition[name](codes), replace(limits[name], speech=False)) for _, name, codes in pieces]
    # Silence is an answer: nothing is heard in it.
    answers = {n: Answer(speech=tuple(result.speech)) for n, (_, result) in spoken.items()}
    for (n, _, codes), result in zip(pieces, _generate(engine, asked), strict=True):
        before = answers[n]
        if isinstance(result, RequestError):
            answers[n] = Answer(problem=result.cause)
        elif not before.problem:
            text = f"{before.text} {result.text.strip()}".strip()
            answers[n] = replace(before, text=text, frames=before.frames + len(codes))
    return answers


def answer_limits(questions: Sequence[Question]) -> GenerationConfig:
    """Returns how an ability's questions are answered: greedily, up to about twice as long as the longest reference."""
    # Of text that is spoken the tokens are not known: about three bytes each.
    tokens = max((question.tokens or len(question.reference.encode()) // 3 + 1 for question in questions), default=1)
    frames = max((question.frames for question in questions), default=1)
    # A prompt that ends where speech begins needs no leave to speak; an answer of text and speech does.
    speech = any(question.frames and question.tokens for question in questions)
    return GenerationConfig(
        max_tokens=2 * tokens + _BEYOND, segment_frames=2 * frames + _BEYOND, speech=speech
    ).greedy()


def longest(abilities: Mapping[str, Sequence[Question]]) -> int:
    """Returns the items that a prompt of these and its answer have together, at most."""
    most = 1
    for questions in abilities.values():
        limits = answer_limits(questions)
        # The request to transcribe an answer in speech holds all its frames.
        answer = max(limits.max_tokens, limits.segment_frames)
        heard = limits.segment_frames + limits.max_tokens if any(question.frames for question in questions) else 0
        prompt = max((len(question.prompt.tokens) for question in questions), default=0)
        most = max(most, prompt + answer + 2, heard + 64)
    return most


def _generate(
    engine: Engine, asked: Sequence[tuple[Prompt, GenerationConfig]]
) -> list[GenerationResult | RequestError]:
    # All are in line before the first is waited for, so that they share steps; the key draws nothing.
    key, requests = jax.random.key(0), []
    for prompt, settings in asked:
        try:
            requests.append(engine.submit(prompt, settings, key))
        except RequestError as error:
            requests.append(error)
    results: list[GenerationResult | RequestError] = []
    for request in requests:
        try:
            failed = isinstance(request, RequestError)
            results.append(request if failed else GenerationResult.from_events(request))
        except RequestError as error:
            results.append(error)
    return results


def score_answers(
    questions: Sequence[Question], answers: Sequence[Answer], left_out: Mapping[str, int]
) -> AbilityScore | None:
    """Scores the answers of one ability; None where no question was answered."""
    counted = [(question, answer) for question, answer in zip(questions, answers, strict=True) if not answer.problem]
    problems = Counter(left_out) + Counter(answer.problem for answer in answers if answer.problem)
    if not counted:
        return None
    asked, kind = [question for question, _ in counted], kind_of(questions)
    if kind == "exact":
        got = [float(exact_match(answer.text, [question.reference])) for question, answer in counted]
        of, chance = [1.0] * len(got), blind_accuracy(asked)
    else:
        edits = [count_plain_errors(answer.text, question.reference, "characters") for question, answer in counted]
        got, of = [float(edit) for edit, _ in edits], [float(units) for _, units in edits]
        chance = others_error_rate(asked)
    low, high = interval(resample(got, of))
    return AbilityScore(
        kind=kind,
        items=len(counted),
        score=sum(got) / max(sum(of), 1.0),
        low=low,
        high=high,
        chance=chance,
        wer=None if kind == "exact" else _word_error_rate(counted),
        left_out=dict(problems),
    )


def kind_of(questions: Sequence[Question]) -> Kind:
    """Tells how the answers of an ability are scored, by what its references are."""
    if any(question.frames for question in questions):
        return "speech"
    return "transcription" if all(question.type in TRANSCRIPTIONS for question in questions) else "exact"


def blind_accuracy(questions: Sequence[Question]) -> float:
    """Returns the share of right answers of who knows the prompts' text and all references, and sees no media.

    He answers every item of a prompt by that prompt's most frequent reference; prompts that come once share one answer.
    So do all prompts of text alone: who has read those has seen all that there is.
    """
    shown: dict[str, list[str]] = {}
    alone: list[str] = []
    for question in questions:
        media = len(question.prompt.visual_slots) or len(question.prompt.audio_slots)
        group = shown.setdefault(question.asked, []) if media else alone
        group.append(plain_words(question.reference))
    alone += [found[0] for found in shown.values() if len(found) == 1]
    groups = [alone, *(found for found in shown.values() if len(found) > 1)]
    right = sum(Counter(group).most_common(1)[0][1] for group in groups if group)
    return right / len(questions)


def others_error_rate(questions: Sequence[Question]) -> float:
    """Returns the error rate of characters where each item is answered by the references of others, a few each.

    At most 1, which is that of no answers at all.
    """
    n, edits, units = len(questions), 0, 0
    for step in range(1, min(n, _OTHERS + 1)):
        for place, question in enumerate(questions):
            errors, spoken = count_plain_errors(
                questions[(place + step) % n].reference, question.reference, "characters"
            )
            edits, units = edits + errors, units + spoken
    return min(1.0, edits / units) if units else 1.0


def _word_error_rate(counted: Sequence[tuple[Question, Answer]]) -> float | None:
    # Chinese has no spaces: its words are not told apart here.
    spaced = [(question, answer) for question, answer in counted if " " in question.reference.strip()]
    edits = [count_plain_errors(answer.text, question.reference, "words") for question, answer in spaced]
    return sum(edit for edit, _ in edits) / sum(units for _, units in edits) if spaced else None


def ability_table(scores: Mapping[str, AbilityScore], title: str) -> Table:
    """Draws the scores of a run: each beside chance, and whether it is beyond it."""
    table = Table(title=title)
    for column in ("ability", "items", "score", "chance", "beyond chance", "media gain"):
        table.add_column(column, justify="left" if column in ("ability", "score", "beyond chance") else "right")
    for name, score in scores.items():
        gain = "" if score.media_gain is None else f"{score.media_gain:+.2f}"
        beyond = "yes" if score.beyond_chance else "no"
        found = f"{score.name} {100 * score.score:.0f} %"
        table.add_row(name, str(score.items), found, f"{100 * score.chance:.0f} %", beyond, gain)
    return table
