"""How large documents and their media are, by headers alone, as tables that many shards' documents fit in."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from data_pipelines.documents.document import Document
from data_pipelines.documents.prompts import (
    AudioElement,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    parse_prompt,
)
from data_pipelines.media.audio import probe_audio
from data_pipelines.media.containers import MAX_VIDEO_SECONDS
from data_pipelines.media.images import probe_image
from data_pipelines.media.location import find_media
from data_pipelines.media.videos import probe_video

SCHEMA = 1  # of saved tables: raise it when they hold something else than before
KINDS = ("image", "frame", "video", "audio", "speech")  # stills, listed frames, files; audio heard, speech to generate
_CLOCK = 1000  # Hz at which lengths of audio are told


@dataclass(frozen=True)
class MediaMeasure:
    """One medium, by its header."""

    kind: str  # of `KINDS`
    height: int  # in pixels; 0: it has none
    width: int  # in pixels; 0: it has none
    seconds: float  # 0: it has no length
    bytes: int  # of the file


@dataclass(frozen=True)
class DocumentMeasure:
    """One document. Text that is tokenized already does not count: only its tokenizer knows how long it is."""

    type: str
    characters: int  # of text, names of special tokens included
    media: tuple[MediaMeasure, ...]  # in order


def measure_document(document: Document) -> DocumentMeasure:
    """Raises SampleError: "bad_prompt", "missing_file", "outside_root", "unreadable_media", "too_big_media"."""
    elements = parse_prompt(document.text)
    characters = sum(len(element.text) for element in elements if isinstance(element, TextElement))
    media = [_measure(each, document) for each in elements if not isinstance(each, TextElement | TokensElement)]
    return DocumentMeasure(document.type, characters, tuple(media))


def _measure(element: ImageElement | VideoElement | AudioElement, document: Document) -> MediaMeasure:
    media = find_media(element.reference, document.media)
    if isinstance(element, ImageElement):
        height, width = probe_image(media)
        return MediaMeasure("frame" if element.frame else "image", height, width, 0.0, media.size)
    if isinstance(element, VideoElement):
        probe = probe_video(media, 1.0, MAX_VIDEO_SECONDS)
        return MediaMeasure("video", probe.height, probe.width, probe.seconds, media.size)
    seconds = probe_audio(media, _CLOCK) / _CLOCK
    return MediaMeasure("speech" if element.spoken else "audio", 0, 0, seconds, media.size)


@dataclass(frozen=True)
class Measures:
    """Measures of n documents and their m media as columns."""

    types: tuple[str, ...]
    type: Int32[np.ndarray, "n"]  # numbers into `types`
    characters: Int64[np.ndarray, "n"]
    media_places: Int64[np.ndarray, "n+1"]  # document i's media begin at [i] and end before [i + 1]
    kind: UInt8[np.ndarray, "m"]  # numbers into `KINDS`
    height: Int32[np.ndarray, "m"]
    width: Int32[np.ndarray, "m"]
    seconds: Float32[np.ndarray, "m"]
    bytes: Int64[np.ndarray, "m"]

    def __len__(self) -> int:
        return len(self.type)

    def media_type(self) -> Int32[np.ndarray, "m"]:
        """Returns the type of the document that each medium is in."""
        return np.repeat(self.type, np.diff(self.media_places))

    def save(self, path: Path) -> None:
        """Writes the table; the same measures give the same bytes."""
        with path.open("wb") as file:
            columns: dict[str, Any] = {"schema": np.array(SCHEMA), "types": np.array(json.dumps(self.types))}
            np.savez(file, **(vars(self) | columns))


def collect(documents: Sequence[DocumentMeasure]) -> Measures:
    """Makes the table of these documents."""
    types = sorted({document.type for document in documents})
    media = [each for document in documents for each in document.media]
    counts = [len(document.media) for document in documents]
    return Measures(
        types=tuple(types),
        type=np.array([types.index(document.type) for document in documents], np.int32),
        characters=np.array([document.characters for document in documents], np.int64),
        media_places=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        kind=np.array([KINDS.index(each.kind) for each in media], np.uint8),
        height=np.array([each.height for each in media], np.int32),
        width=np.array([each.width for each in media], np.int32),
        seconds=np.array([each.seconds for each in media], np.float32),
        bytes=np.array([each.bytes for each in media], np.int64),
    )


def load_measures(path: Path) -> Measures:
    """Reads what `Measures.save` wrote. Raises OSError when it cannot be read, ValueError when it is damaged or
    another.
    """
    try:
        with np.load(path) as arrays:
            columns: dict[str, Any] = {
                name: arrays[name] for name in ("schema", *(field.name for field in fields(Measures)))
            }
    except (BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    if (schema := int(columns.pop("schema"))) != SCHEMA:
        raise ValueError(f"it has schema {schema}; this program reads {SCHEMA}")
    columns["types"] = tuple(json.loads(str(columns["types"])))
    return Measures(**columns)


def join(tables: Iterable[Measures]) -> Measures:
    """Joins several tables into one, in order."""
    tables = list(tables) or [collect([])]
    # Types are numbered anew, over all tables.
    types = tuple(sorted({name for table in tables for name in table.types}))
    numbers = [np.array([types.index(name) for name in table.types], np.int32)[table.type] for table in tables]
    # Media of later tables come behind those of earlier ones.
    starts = np.cumsum([0, *(len(table.kind) for table in tables)])
    places = [table.media_places[:-1] + start for table, start in zip(tables, starts, strict=False)]
    rest = [field.name for field in fields(Measures) if field.name not in ("types", "type", "media_places")]
    return Measures(
        types=types,
        type=np.concatenate(numbers),
        media_places=np.concatenate([*places, starts[-1:]]).astype(np.int64),
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in rest},
    )


def totals(measures: Measures) -> dict[str, dict[str, int | float]]:
    """Sums by type: documents, characters, stills and listed frames, videos, audio clips; pixels, times, bytes."""
    return {name: _sums(measures, number) for number, name in enumerate(measures.types)}


def _sums(measures: Measures, number: int) -> dict[str, int | float]:
    documents, media = measures.type == number, measures.media_type() == number
    video, still = measures.kind == KINDS.index("video"), measures.kind <= KINDS.index("frame")
    audio = measures.kind >= KINDS.index("audio")
    pixels = measures.height.astype(np.int64) * measures.width

    def seconds(which: np.ndarray) -> float:
        return round(float(measures.seconds[which].sum(dtype=np.float64)), 3)

    return {
        "documents": int(documents.sum()),
        "characters": int(measures.characters[documents].sum()),
        "pictures": int((media & still).sum()),
        "pixels": int(pixels[media & still].sum()),
        "videos": int((media & video).sum()),
        "video_seconds": seconds(media & video),
        "sounds": int((media & audio).sum()),
        "audio_seconds": seconds(media & audio),
        "media_bytes": int(measures.bytes[media].sum()),
    }
