"""Filter rules: the verdict on one document, synthetic speech checked by a recognizer, near-duplicates among many.

`--transcriber package.module:factory` names a callable without arguments that returns a `Transcriber`.

Near-duplicates are found by MinHash, among any number of documents. A document is the set of its runs of 5 characters,
with its media, so that only documents with the same media are alike. A signature keeps the smallest of the set under
each of 128 orders: two signatures agree in about as many places as the sets overlap (their Jaccard index). datasketch
makes the signatures and chooses the bands; documents that agree in a whole band are compared.

One band is looked at after the other, on numbers alone: 512 bytes a document on disk, 60 in memory at the peak. A table
of buckets in memory, as datasketch's own index has, would take kilobytes a document.
"""

import hashlib
import importlib
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import SPEECH_TYPES, Document
from data_pipelines.documents.prompt_writing import SPEAK_TEXT, TRANSCRIBE, choose_prompt, plain_text, text_of
from data_pipelines.documents.prompts import AudioElement, Element, TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.location import find_media
from data_pipelines.text.spoken_text import detect_language, language_of
from data_pipelines.tools.commands import load_hook

RATE = 16000  # Hz
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@runtime_checkable
class Transcriber(Protocol):
    """What recognizes speech."""

    def transcribe(self, samples: np.ndarray, rate: int, language: str) -> str:
        """Returns the words spoken in `samples`, float32 (t,) in [-1, 1] at `rate` Hz, in `language` ("en", "zh")."""
        ...


def spoken_texts(elements: Sequence[Element]) -> list[tuple[str, AudioElement]]:
    """Pairs every audio that is spoken, with the text right before it, less our own prompts to speak it.

    TTS is (text, audio), ITTS (text, audio, text, audio, ...).

    Raises SampleError "no_speech" when there is none, or one that no text comes before.
    """
    # What stands between two pieces of speech is the text of the second.
    pairs, texts = [], []
    for element in elements:
        if isinstance(element, TextElement):
            texts.append(element)
        elif isinstance(element, AudioElement) and element.spoken:
            pairs.append((_without_prompt(text_of(texts)), element))
            texts = []
    if not pairs or not all(text for text, _ in pairs):
        raise SampleError("no_speech", "there is no speech in it that stands behind its text")
    return pairs


def _without_prompt(text: str) -> str:
    for prompts in SPEAK_TEXT.values():
        for prompt in prompts:
            text = text.removeprefix(prompt.strip())
    return text.strip()


def check_speech(document: Document, elements: Sequence[Element], transcriber: Transcriber) -> float:
    """Measures the error rate of a document's speech: edits over units, which are characters in Chinese, words in
    English.

    Raises SampleError: "no_speech"; what reading the audio raises; "transcriber_failed".
    """
    # Over all speech of a document together: short pieces do not weigh more than long ones.
    edits = units = 0
    for text, audio in spoken_texts(elements):
        media = find_media(audio.reference, document.media)
        samples = decode_audio(media, probe_audio(media, RATE), RATE)
        language = language_of(text) or "en"
        try:
            heard = transcriber.transcribe(samples, RATE, language)
        except Exception as error:  # the user's program may raise anything
            raise SampleError("transcriber_failed", f"{media.name}: {error or type(error).__name__}") from error
        if not isinstance(heard, str):
            raise SampleError("transcriber_failed", f"{media.name}: it heard {type(heard).__name__}, not text")
        wanted = speech_units(text, language)
        edits, units = edits + count_edits(wanted, speech_units(heard, language)), units + len(wanted)
    if not units:
        raise SampleError("no_speech", "its text has nothing that can be spoken")
    return edits / units


def speech_units(text: str, language: str) -> list[str]:
    """Cuts text into characters (Chinese) or words (English): small letters, no punctuation, widths of characters made
    one.

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
    # One row of the table at a time: `diagonal` is what stood to the upper left.
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


KEPT, ASR, REJECTED = "kept", "asr", "rejected"


@dataclass(frozen=True)
class FilterRules:
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


def judge(document: Document, rules: FilterRules) -> Verdict:
    """Gives the verdict on one document by itself. Raises SampleError when it cannot be read, or its speech not
    checked.
    """
    # Text by its length and language; a document of media alone has neither.
    elements = tuple(parse_prompt(document.text))
    kept = Verdict(KEPT, document.type, elements)
    text = plain_text(document.text)
    if text or not any(not isinstance(element, TextElement) for element in elements):
        language = detect_language(text)
        if not rules.shortest <= len(text) <= rules.longest:
            return replace(kept, part=REJECTED, cause="length", score=len(text))
        if language not in (*rules.languages, "none"):
            return replace(kept, part=REJECTED, cause="language", score=language)
    if rules.transcriber and document.type in SPEECH_TYPES:
        return _judge_speech(document, kept, rules)
    return kept


def _judge_speech(document: Document, kept: Verdict, rules: FilterRules) -> Verdict:
    # Good speech stays; worse speech can still be listened to, with its text as the answer; the rest is noise.
    transcriber = load_hook("--transcriber", rules.transcriber, "transcribe")
    score = round(check_speech(document, kept.elements, transcriber), 4)
    if score <= rules.asr_above:
        return replace(kept, score=score)
    if score > rules.reject_above:
        return replace(kept, part=REJECTED, cause="speech_errors", score=score)
    return Verdict(ASR, "asr", _to_transcribe(document, kept.elements), "speech_errors", score)


def _to_transcribe(document: Document, elements: Sequence[Element]) -> tuple[Element, ...]:
    """Turns spoken audio into heard audio, each piece with its text to be written."""
    rng = random.Random(document.id)
    heard: list[Element] = []
    for text, audio in spoken_texts(elements):
        prompt = choose_prompt(TRANSCRIBE, language_of(text), rng)
        heard += [TextElement(prompt), AudioElement(audio.reference), TextElement(text, trainable=True, plain=True)]
    return tuple(heard)


PLACES = 128
RUN = 5  # characters
CHUNK = 1 << 13  # signatures looked at together
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that runs of one length do not collide by construction


def load_datasketch() -> ModuleType:
    """Imports the extra. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise ConfigError("near-duplicates need datasketch: pip install baichuan_omni_jax[synthesis]") from error


def sign(text: str, media: Sequence[str] = ()) -> UInt32[np.ndarray, " places"]:
    """Returns the signature of a text with media, given by the SHA-256 of each; letter case and white space do not
    count.
    """
    plain = "".join(unicodedata.normalize("NFKC", text).lower().split())
    salt = hashlib.sha256("\n".join(media).encode()).digest()[:8]
    characters = np.frombuffer(plain.encode("utf-32-le", errors="replace"), np.uint32).astype(np.uint64)
    # A polynomial hash of every run of characters, begun with the media: texts of other media share no run.
    runs = np.full(max(len(characters) - RUN + 1, 1), np.frombuffer(salt, np.uint64)[0])
    for shift in range(min(RUN, len(characters))):
        runs = runs * _MULTIPLIER + characters[shift : shift + len(runs)]
    hashed = np.unique((runs * _MULTIPLIER) >> np.uint64(32))
    empty = _empty()
    signature = load_datasketch().MinHash(PLACES, hashfunc=int, permutations=empty.permutations, scheme=empty.scheme)
    signature.update_batch(hashed.tolist())
    return signature.hashvalues


def likeness(signatures: UInt32[np.ndarray, "n p"], some: Int64[np.ndarray, " m"], others: Int64[np.ndarray, " m"]):
    """Estimates the Jaccard index (m,) of each document of `some` with its one of `others`."""
    found = np.ones(len(some))
    for place in range(0, len(some), CHUNK):
        here = slice(place, place + CHUNK)
        found[here] = (signatures[some[here]] == signatures[others[here]]).mean(axis=1)
    return found


def find_duplicates(signatures: UInt32[np.ndarray, "n p"], threshold: float) -> Int64[np.ndarray, " n"]:
    """Returns for each document the first one that it is a duplicate of, itself where there is none.

    Documents are alike when their signatures agree in `threshold` of the places, and duplicates when a chain of alike
    ones joins them. Those of one bucket are compared with its first, what is unlike that with the first of the rest,
    and so on. The result depends on the signatures and their order alone; `signatures` may lie on disk.
    """
    first = np.arange(len(signatures))
    bands, rows = _bands(threshold)
    for band in range(bands):
        # Sorting brings the members of a bucket together; no table of buckets is held.
        keys = _band_keys(signatures, band * rows, rows)
        left = np.argsort(keys, kind="stable")  # by bucket, in the order of the documents inside
        while len(left):
            # The heads of the buckets stand for them in this round; they are done, the others are compared with them.
            starts = np.flatnonzero(np.append(True, keys[left[1:]] != keys[left[:-1]]))
            heads = np.repeat(left[starts], np.diff(np.append(starts, len(left))))
            others = left != heads
            left, heads = left[others], heads[others]
            alike = likeness(signatures, left, heads) >= threshold
            # Union-find: of two chains that meet, the smaller document stands for both.
            for one, head in zip(left[alike].tolist(), heads[alike].tolist(), strict=True):
                low, high = sorted((_root(first, one), _root(first, head)))
                first[high] = low
            left = left[~alike]
    for i in range(len(first)):  # ascending: what it points to is resolved already
        first[i] = first[first[i]]
    return first


@lru_cache
def _empty() -> Any:
    return load_datasketch().MinHash(PLACES, seed=1)


@lru_cache
def _bands(threshold: float) -> tuple[int, int]:
    """Chooses (bands, places of each) so that hardly a pair is missed; false ones are found out when they are
    compared.
    """
    index = load_datasketch().MinHashLSH(threshold=threshold, num_perm=PLACES, weights=(0.1, 0.9))
    return index.b, index.r


def _band_keys(signatures: UInt32[np.ndarray, "n p"], start: int, rows: int) -> UInt64[np.ndarray, " n"]:
    keys = np.zeros(len(signatures), np.uint64)
    for place in range(0, len(signatures), CHUNK):
        chunk = signatures[place : place + CHUNK, start : start + rows].astype(np.uint64)
        mixed = np.zeros(len(chunk), np.uint64)
        for column in chunk.T:
            mixed = (mixed ^ column) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
        keys[place : place + CHUNK] = mixed
    return keys


def _root(first: Int64[np.ndarray, " n"], one: int) -> int:
    while first[one] != one:
        first[one] = first[first[one]]
        one = int(first[one])
    return one
