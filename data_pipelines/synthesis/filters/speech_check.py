"""Synthetic speech checked by listening: what a recogniser hears against what was to be said.

`--transcriber package.module:factory` names a callable without arguments that returns a `Transcriber`.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import text_of
from data_pipelines.documents.prompts import Element, Sound, Text
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_sound, probe_sound
from data_pipelines.media.location import find_media
from data_pipelines.synthesis.task_prompts import READ_ALOUD
from data_pipelines.text.languages import language_of

RATE = 16000  # Hz
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@runtime_checkable
class Transcriber(Protocol):
    """What recognises speech."""

    def transcribe(self, samples: np.ndarray, rate: int, language: str) -> str:
        """What is said in `samples`, float32 (t,) in [-1, 1] at `rate` Hz, in `language` ("en", "zh")."""


def spoken_texts(elements: Sequence[Element]) -> list[tuple[str, Sound]]:
    """Every sound that is spoken, with the text right before it, less our own prompts to read aloud.

    TTS is (text, audio), ITTS (text, audio, text, audio, ...).

    Raises SampleError "no_speech" when there is none, or one that no text comes before.
    """
    pairs, texts = [], []
    for element in elements:
        if isinstance(element, Text):
            texts.append(element)
        elif isinstance(element, Sound) and element.spoken:
            pairs.append((_without_prompt(text_of(texts)), element))
            texts = []
    if not pairs or not all(text for text, _ in pairs):
        raise SampleError("no_speech", "there is no speech in it that stands behind its text")
    return pairs


def _without_prompt(text: str) -> str:
    for prompts in READ_ALOUD.values():
        for prompt in prompts:
            text = text.removeprefix(prompt.strip())
    return text.strip()


def check_speech(document: Document, elements: Sequence[Element], transcriber: Transcriber) -> float:
    """The error rate of all its speech: edits over units, which are characters in Chinese, words in English.

    Raises SampleError: "no_speech"; what reading the sounds raises; "transcriber_failed".
    """
    edits = units = 0
    for text, sound in spoken_texts(elements):
        media = find_media(sound.reference, document.media)
        samples = decode_sound(media, probe_sound(media, RATE), RATE)
        language = language_of(text) or "en"
        try:
            heard = transcriber.transcribe(samples, RATE, language)
        except Exception as error:  # the user's program may raise anything
            raise SampleError("transcriber_failed", f"{media.name}: {error or type(error).__name__}") from error
        if not isinstance(heard, str):
            raise SampleError("transcriber_failed", f"{media.name}: it heard {type(heard).__name__}, not text")
        said = speech_units(text, language)
        edits, units = edits + count_edits(said, speech_units(heard, language)), units + len(said)
    if not units:
        raise SampleError("no_speech", "its text has nothing that can be said")
    return edits / units


def speech_units(text: str, language: str) -> list[str]:
    """Characters of Chinese, words of English: small letters, no punctuation, widths of characters made one.

    >>> speech_units("Don't go, 小明！", "en"), speech_units("你好，Ｂ！", "zh")
    (["don't", 'go', '小明'], ['你', '好', 'b'])
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower().replace("’", "'"))
    return words if language == "en" else list("".join(words))


def count_edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance: how many units must be changed, added or left out to make one into the other.

    >>> count_edits("kitten", "sitting")
    3
    """
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]
