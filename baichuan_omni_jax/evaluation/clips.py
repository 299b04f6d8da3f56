"""The clips of a manifest with what is said in them: for those who judge sound, not for training."""

from collections import Counter
from collections.abc import Iterator, Sequence
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
from data_pipelines.synthesis.filters.rules import spoken_texts

SPOKEN_TYPES = ("tts", "itts")


@dataclass(frozen=True)
class Clip:
    """One sound of a document; `text` is what is said in it, "" where the document does not tell. `name` is its own."""

    name: str
    media: Media
    text: str

    def samples(self, rate: int) -> Float32[np.ndarray, " t"]:
        """Mono, full scale 1, at `rate` Hz. Raises SampleError as `decode_audio`."""
        return decode_audio(self.media, probe_audio(self.media, rate), rate)


def read_clips(
    manifest: Path, root: Path | None, skipped: Counter, trusted: Sequence[Path] = ANY_FOLDER
) -> Iterator[Clip]:
    """The sounds of a manifest's documents, in order; what cannot be read is counted in `skipped` by its cause.

    The text of an `asr` document is what carries loss, of `tts` and `itts` what stands before each sound. Where media
    lie: `sources.media_root`. Raises ConfigError when the manifest cannot be opened.
    """
    for line in read_manifest(manifest.name, manifest.parent, media_root(manifest, root, trusted)):
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            sounds = _sounds(line.document)
        except SampleError as error:
            skipped[error.cause] += 1
            continue
        for number, (sound, text) in enumerate(sounds):
            try:
                media = find_media(sound.reference, line.document.media)
            except SampleError as error:
                skipped[error.cause] += 1
                continue
            yield Clip(f"{line.document.id}/{number}" if len(sounds) > 1 else line.document.id, media, text)


def _sounds(document: Document) -> list[tuple[AudioElement, str]]:
    elements = parse_prompt(document.text)
    kind = document.type.lower()
    sounds = [element for element in elements if isinstance(element, AudioElement)]
    if kind in SPOKEN_TYPES:
        return [(sound, text) for text, sound in spoken_texts(elements)]
    text = _learnt(elements) if kind == "asr" and len(sounds) == 1 else ""
    return [(sound, text) for sound in sounds]


def _learnt(elements: list[Element]) -> str:
    """The text that carries loss."""
    return text_of(element for element in elements if isinstance(element, TextElement) and element.trainable)
