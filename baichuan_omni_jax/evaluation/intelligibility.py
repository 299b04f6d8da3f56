"""How well speech can be understood after something was done to it: STOI, PESQ, and what a recognizer makes of it.

STOI and PESQ come from kept libraries (`pystoi`, `pesq`; the extra `evaluate`), each used where it is installed. Clips
come from a manifest, with the text that is spoken in them.
"""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from data_pipelines.datasets.sources import ANY_FOLDER, media_root
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import read_manifest
from data_pipelines.documents.prompt_writing import text_of
from data_pipelines.documents.prompts import AudioElement, Element, TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.location import Media, find_media
from data_pipelines.synthesis.filters.rules import count_edits, speech_units, spoken_texts
from data_pipelines.text.spoken_text import language_of

RATE = 16000  # Hz, of both measures
LIBRARIES = {"stoi": "pystoi", "pesq": "pesq"}
SPOKEN_TYPES = ("tts", "itts")

Wave = Float32[np.ndarray, "_"]
Recognizer = Callable[[np.ndarray, int], str]


@dataclass(frozen=True)
class Clip:
    """One audio element of a document; `text` is what is spoken in it, "" where the document does not tell.

    `name` is the document's own, with the element's number where there are several.
    """

    name: str
    media: Media
    text: str

    def samples(self, rate: int) -> Float32[np.ndarray, " t"]:
        """Decodes it: mono, full scale 1, at `rate` Hz. Raises SampleError as `decode_audio`."""
        return decode_audio(self.media, probe_audio(self.media, rate), rate)


def missing_measures() -> list[str]:
    """Makes a sentence for each measure whose library is not installed."""
    return [
        f"{measure} is left out: {package} is not installed (pip install '.[evaluate]', or pip install {package})"
        for measure, package in LIBRARIES.items()
        if importlib.util.find_spec(package) is None
    ]


def measure(original: Wave, again: Wave) -> dict[str, float]:
    """Measures `stoi` (about 0 to 1) and `pesq` (wide band, 1 to 4.6) of speech at `RATE` Hz against what it was.

    The longer one is cut. A measure whose library is missing, or that finds too little speech, is left out.
    """
    # Sample by sample: what one of them has more is cut.
    length = min(len(original), len(again))
    pair = original[:length], again[:length]
    if not pair[0].any():
        return {}
    found = {}
    # A library that is missing leaves its measure out.
    for name, function in (("stoi", _stoi), ("pesq", _pesq)):
        value = function(*pair) if importlib.util.find_spec(LIBRARIES[name]) else None
        if value is not None:
            found[name] = float(value)
    return found


def _stoi(original: Wave, again: Wave) -> float | None:
    from pystoi import stoi

    with warnings.catch_warnings():
        # It warns, and returns 1e-5, where 0.4 s are not left when silence is cut out.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            value = stoi(original, again, RATE)
        except (RuntimeWarning, ValueError):
            return None
    return value if np.isfinite(value) else None


def _pesq(original: Wave, again: Wave) -> float | None:
    from pesq import PesqError, pesq

    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = pesq(RATE, original, again, "wb")
    except (PesqError, ValueError):
        return None
    return value if np.isfinite(value) else None


class RecognitionErrors:
    """Counts a recognizer's errors over many clips: words in English, characters in Chinese; and characters in both.

    `recognizer(samples, rate) -> text` is the user's own.
    """

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        self._counts: dict[str, int] = dict.fromkeys(("word_edits", "words", "character_edits", "characters"), 0)

    def recognize(self, samples: Wave, rate: int) -> str:
        """Recognizes a clip. Raises SampleError "recognizer_failed" where the hook raises, or returns no text."""
        try:
            heard = self._recognizer(samples, rate)
        except Exception as error:  # the user's program may raise anything
            raise SampleError("recognizer_failed", str(error) or type(error).__name__) from error
        if not isinstance(heard, str):
            raise SampleError("recognizer_failed", f"it heard {type(heard).__name__}, not text")
        return heard

    def count(self, recognized: str, spoken: str) -> None:
        """Adds the errors of one clip: the recognized text against what was spoken."""
        language = language_of(spoken) or "en"
        # Words by the clip's language, and characters as in Chinese for all.
        for unit, of in (("word", language), ("character", "zh")):
            truth = speech_units(spoken, of)
            self._counts[f"{unit}_edits"] += count_edits(truth, speech_units(recognized, of))
            self._counts[f"{unit}s"] += len(truth)

    def rates(self) -> dict[str, float]:
        """Returns `wer` and `cer`, edits over units; nothing where nothing was spoken."""
        counts = self._counts
        if not counts["words"]:
            return {}
        return {"wer": counts["word_edits"] / counts["words"], "cer": counts["character_edits"] / counts["characters"]}


def read_clips(
    manifest: Path, root: Path | None, skipped: Counter, trusted: Sequence[Path] = ANY_FOLDER
) -> Iterator[Clip]:
    """Yields the audio of a manifest's documents, in order.

    The text of an `asr` document is what carries loss, of `tts` and `itts` what stands before each audio element.

    Args:
        manifest: the JSON lines file.
        root: where its media lie (None: `sources.media_root` says where).
        skipped: counts by its cause what cannot be read.
        trusted: folders that media may lie in.

    Raises:
        ConfigError: when the manifest cannot be opened.
    """
    # A line that cannot be used is counted, and the others are read.
    for line in read_manifest(manifest.name, manifest.parent, media_root(manifest, root, trusted)):
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            found = _audio_elements(line.document)
        except SampleError as error:
            skipped[error.cause] += 1
            continue
        for number, (element, text) in enumerate(found):
            try:
                media = find_media(element.reference, line.document.media)
            except SampleError as error:
                skipped[error.cause] += 1
                continue
            yield Clip(f"{line.document.id}/{number}" if len(found) > 1 else line.document.id, media, text)


def _audio_elements(document: Document) -> list[tuple[AudioElement, str]]:
    """Lists a document's audio elements with what is spoken in each."""
    elements = parse_prompt(document.text)
    kind = document.type.lower()
    found = [element for element in elements if isinstance(element, AudioElement)]
    # Text to speech says its text before the audio, recognition after it, in what it trains.
    if kind in SPOKEN_TYPES:
        return [(element, text) for text, element in spoken_texts(elements)]
    text = _trainable_text(elements) if kind == "asr" and len(found) == 1 else ""
    return [(element, text) for element in found]


def _trainable_text(elements: list[Element]) -> str:
    """Joins the text that carries loss."""
    return text_of(element for element in elements if isinstance(element, TextElement) and element.trainable)
