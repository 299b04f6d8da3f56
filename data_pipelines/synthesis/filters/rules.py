"""What a filter says of one document: kept, to be heard instead of spoken, or rejected, and why."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.documents.prompts import Element, Sound, Text, parse_prompt
from data_pipelines.synthesis.filters.speech_check import check_speech, spoken_texts
from data_pipelines.synthesis.hooks import load_hook
from data_pipelines.synthesis.task_prompts import TRANSCRIBE, choose_prompt
from data_pipelines.text.languages import detect_language, language_of

KEPT, ASR, REJECTED = "kept", "asr", "rejected"
SPEECH_TYPES = ("tts", "itts")  # documents whose speech stands right behind its text


@dataclass(frozen=True)
class Rules:
    """What a document must be.

    `languages` are those of `languages.detect_language`; text without letters is of all. Characters are those of the
    plain text. `duplicates` is the likeness from which a document repeats an earlier one, 0 to keep all. Speech is
    checked by `transcriber` ("" for no check): with an error rate above `asr_above` it is only good to be heard, above
    `reject_above` for nothing.
    """

    languages: tuple[str, ...] = ("en", "zh", "mixed")
    shortest: int = 2
    longest: int = 1_000_000
    duplicates: float = 0.8
    transcriber: str = ""
    asr_above: float = 0.1
    reject_above: float = 0.5


@dataclass(frozen=True)
class Verdict:
    """Where a document goes, as which type and elements; `cause` and `score` say why it is not kept as it is.

    The score is the number that decided: characters, or the error rate of speech that was checked.
    """

    part: str
    type: str
    elements: tuple[Element, ...]
    cause: str = ""
    score: int | float | str | None = None


def judge(document: Document, rules: Rules) -> Verdict:
    """The verdict on one document by itself. Raises SampleError when it cannot be read, or its speech not checked."""
    elements = tuple(parse_prompt(document.text))
    kept = Verdict(KEPT, document.type, elements)
    text = plain_text(document.text)
    if text or not any(not isinstance(element, Text) for element in elements):
        language = detect_language(text)
        if not rules.shortest <= len(text) <= rules.longest:
            return replace(kept, part=REJECTED, cause="length", score=len(text))
        if language not in (*rules.languages, "none"):
            return replace(kept, part=REJECTED, cause="language", score=language)
    if rules.transcriber and document.type in SPEECH_TYPES:
        return _judge_speech(document, kept, rules)
    return kept


def _judge_speech(document: Document, kept: Verdict, rules: Rules) -> Verdict:
    transcriber = load_hook("--transcriber", rules.transcriber, "transcribe")
    score = round(check_speech(document, kept.elements, transcriber), 4)
    if score <= rules.asr_above:
        return replace(kept, score=score)
    if score > rules.reject_above:
        return replace(kept, part=REJECTED, cause="speech_errors", score=score)
    return Verdict(ASR, "asr", _to_transcribe(document, kept.elements), "speech_errors", score)


def _to_transcribe(document: Document, elements: Sequence[Element]) -> tuple[Element, ...]:
    """The speech of a document heard, each piece with its text to be written."""
    rng = random.Random(document.id)
    heard: list[Element] = []
    for text, sound in spoken_texts(elements):
        prompt = choose_prompt(TRANSCRIBE, language_of(text), rng)
        heard += [Text(prompt), Sound(sound.reference), Text(text, trainable=True, plain=True)]
    return tuple(heard)
