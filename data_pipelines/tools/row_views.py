"""What the figure of packed rows shows, as plain arrays: `row_drawing.py` turns them into a figure."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import islice

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from baichuan_omni_jax.config import Budgets, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Document, EncodedDocument
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompts import (
    AudioElement,
    Element,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
)
from data_pipelines.documents.sequence import Ids
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio
from data_pipelines.media.features import log_mel
from data_pipelines.packing.batch import Batch, RowWriter, empty_rows
from data_pipelines.packing.index import Index
from data_pipelines.pipeline import Pipeline


class SlotContent(IntEnum):
    """What a slot of a row holds. A mark is the start or the end of a media item; speech is audio to be generated."""

    PADDING = 0
    TEXT = 1
    MARK = 2
    IMAGE = 3
    FRAME = 4
    AUDIO = 5
    SPEECH = 6


class SlotLoss(IntEnum):
    """What a slot of a row has to predict."""

    NONE = 0
    TEXT = 1
    AUDIO = 2


@dataclass(frozen=True)
class RowSegment:
    """A document's place in a row."""

    start: int
    stop: int
    document: Document


@dataclass(frozen=True)
class RowView:
    """One packed row of t slots: its documents, what each slot holds and predicts, {budget: (used, size)}."""

    segments: list[RowSegment]
    contents: Int32[np.ndarray, " t"]
    losses: Int32[np.ndarray, " t"]
    fill: dict[str, tuple[int, int]]

    def describe_fill(self) -> str:
        """Describes how full each budget is: `tokens 1010/1024 (99 %), ...`."""
        return ", ".join(
            f"{name.replace('_', ' ')} {used}/{size} ({100 * used / size:.0f} %)"
            for name, (used, size) in self.fill.items()
            if size
        )


@dataclass(frozen=True)
class ImageView:
    """An image put together again from its patches; `centers` is (x, y) in pixels of each visual token, in order."""

    kind: SlotContent
    pixels: UInt8[np.ndarray, "h w 3"]
    centers: Float32[np.ndarray, "v 2"]


@dataclass(frozen=True)
class MelView:
    """One window of a clip, at most 30 s: its log mel, start and length in seconds, and its code frames."""

    kind: SlotContent
    name: str
    mel: Float32[np.ndarray, "mels frames"]
    start: float
    seconds: float
    code_frames: int


@dataclass(frozen=True)
class DocumentView:
    """One document by itself: its sequence as a row without padding, its prompt, its media."""

    document: Document
    row: RowView
    elements: list[Element | Ids]
    images: list[ImageView]
    mels: list[MelView]


class BlankCodes:
    """Stands in for the store of audio codes: all codes are 0, as many as each window of the documents has.

    The figure shows where code frames lie, not which they are, so it needs no audio tokenizer.
    """

    def __init__(self, processor: Processor, documents: Iterable[Document]):
        self._levels = processor.config.audio.levels
        self._frames: dict[tuple[str, int], int] = {}
        for document in documents:
            try:
                self._frames |= {item.key: item.window.code_frames for item in processor.audio_items(document)}
            except SampleError:  # encoding the document tells what is wrong with it
                continue

    def lookup(self, key: tuple[str, int]) -> Int32[np.ndarray, "n q"]:
        return np.zeros((self._frames[key], self._levels), np.int32)


def view_rows(pipeline: Pipeline, rows: int) -> tuple[list[RowView], list[str]]:
    """Packs the mixture's first `rows` rows as a run would pack them, and a line about each document that failed.

    Fewer rows when the row plan ends before. Raises ConfigError for a source without usable documents.
    """
    # The plan and the decoder of a run, with codes that are all 0: nothing here packs in a way of its own.
    plan = pipeline.plan()
    planned = [[item.key for item in row] for row in islice(plan, rows)]
    documents = [pipeline.indexes[source].document(number) for row in planned for source, number in row]
    batch, failed = pipeline.decoder(BlankCodes(pipeline.processor, documents))(planned)
    views = [_view_row(batch, i, pipeline.indexes, pipeline.omni, pipeline.config.budgets) for i in range(len(planned))]
    return views, [f"failed: {where} ({cause}): {message}" for where, cause, message in failed.values()]


def find_document(pipeline: Pipeline, name: str) -> Document:
    """Finds the document with id `name`. Raises ConfigError when no manifest has it."""
    for index in pipeline.indexes:
        for entry in index.source.entries():
            if isinstance(entry.document, Document) and entry.document.id == name:
                return entry.document
    raise ConfigError(f"no document has the id {name!r} in {', '.join(index.manifest for index in pipeline.indexes)}")


def richest_document(row: RowView) -> Document:
    """Chooses the document of a row that has most modalities; of several the longest. Raises ConfigError for an empty
    row.
    """
    if not row.segments:
        raise ConfigError("the first row is empty: none of its documents could be decoded")

    def richness(segment: RowSegment) -> tuple[int, int]:
        kinds = set(row.contents[segment.start : segment.stop].tolist())
        return len(kinds), segment.stop - segment.start

    return max(row.segments, key=richness).document


def view_document(document: Document, processor: Processor) -> DocumentView:
    """Returns one document by itself. Raises ConfigError when it cannot be used, saying why."""
    try:
        encoded = processor.encode(document, BlankCodes(processor, [document]))
        mels = _mels(document, processor)
    except SampleError as error:
        raise ConfigError(f"document {document.id} ({document.location}) cannot be used: {error}") from error
    row = _view_alone(document, encoded, processor.config)
    return DocumentView(document, row, processor.elements(document), _images(encoded, processor.config), mels)


def describe(element: Element | Ids) -> tuple[SlotContent, str, bool]:
    """Returns (what it is, its text or file, whether it is learned) of one element of a prompt."""
    if isinstance(element, TextElement):
        return SlotContent.TEXT, element.text, element.trainable
    if isinstance(element, Ids):
        return SlotContent.TEXT, f"[{len(element)} tokens of a longer text]", element.trainable
    name = element.reference.path or "base64 media"
    if isinstance(element, AudioElement):
        return (SlotContent.SPEECH if element.spoken else SlotContent.AUDIO), name, element.spoken and element.trainable
    if isinstance(element, TokensElement):
        return SlotContent.TEXT, f"[{name}: token ids]", element.trainable
    video = isinstance(element, VideoElement) or (isinstance(element, ImageElement) and element.frame)
    return (SlotContent.FRAME if video else SlotContent.IMAGE), name, False


def reassemble(
    patches: UInt8[np.ndarray, "p v"], grid: Int32[np.ndarray, "p 2"], patch: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Puts every patch where its (row, column) says: an image only if order and layout of the patches are right."""
    height, width = (grid.max(0) + 1) * patch
    pixels = np.zeros((height, width, 3), np.uint8)
    # A patch is stored (channel, row, column); an image wants the channel last.
    for values, (row, column) in zip(patches, grid * patch, strict=True):
        pixels[row : row + patch, column : column + patch] = values.reshape(3, patch, patch).transpose(1, 2, 0)
    return pixels


def _view_alone(document: Document, encoded: EncodedDocument, omni: OmniConfig) -> RowView:
    # A row that the document fills exactly: no padding, every budget as large as what it takes.
    budgets = Budgets(**{field.name: getattr(encoded.lengths, field.name) for field in fields(Budgets)})
    batch = empty_rows(1, budgets, omni)
    RowWriter(batch, 0).add(encoded, source=0, number=0)
    tokens = len(encoded.tokens)
    contents, losses = _contents(batch, 0, omni), _losses(batch, 0)
    return RowView([RowSegment(0, tokens, document)], contents, losses, _fill(batch, 0, budgets))


def _view_row(batch: Batch, row: int, indexes: tuple[Index, ...], omni: OmniConfig, budgets: Budgets) -> RowView:
    # Segments count documents from 1 in row order; the batch names source and document of each slot.
    segments = []
    for segment in range(1, int(batch["segment_ids"][row].max(initial=0)) + 1):
        slots = np.flatnonzero(batch["segment_ids"][row] == segment)
        source, number = (int(batch[name][row, slots[0]]) for name in ("source_ids", "document_ids"))
        segments.append(RowSegment(int(slots[0]), int(slots[-1]) + 1, indexes[source].document(number)))
    return RowView(segments, _contents(batch, row, omni), _losses(batch, row), _fill(batch, row, budgets))


def _contents(batch: Batch, row: int, omni: OmniConfig) -> Int32[np.ndarray, " t"]:
    tokens, ids = batch["tokens"][row], omni.tokens
    # From the general to the special: padding or text, then the marks among the text, then what media indices point to.
    contents = np.where(batch["segment_ids"][row] > 0, SlotContent.TEXT, SlotContent.PADDING)
    starts = [ids.audio_start, ids.audiogen_start]
    marks = [*starts, ids.audio_end, ids.audiogen_end, ids.image_start, ids.image_end]
    contents[np.isin(tokens, marks) & (contents == SlotContent.TEXT)] = SlotContent.MARK
    visual = _used(batch["visual_index"][row], len(tokens))
    contents[visual] = np.where(tokens[visual] == ids.video_place, SlotContent.FRAME, SlotContent.IMAGE)
    # Heard and spoken frames have the same pad; the last start mark before them tells which they are.
    last_start = np.maximum.accumulate(np.where(np.isin(tokens, starts), np.arange(len(tokens)), 0))
    audio = _used(batch["audio_index"][row], len(tokens))
    contents[audio] = np.where(tokens[last_start[audio]] == ids.audiogen_start, SlotContent.SPEECH, SlotContent.AUDIO)
    return contents.astype(np.int32)


def _losses(batch: Batch, row: int) -> Int32[np.ndarray, " t"]:
    losses = np.where(batch["text_weights"][row] > 0, SlotLoss.TEXT, SlotLoss.NONE)
    losses[_used(batch["audio_target_index"][row], len(losses))] = SlotLoss.AUDIO
    return losses.astype(np.int32)


def _fill(batch: Batch, row: int, budgets: Budgets) -> dict[str, tuple[int, int]]:
    # Unused slots of media index the row's length: what indexes a slot is used.
    used = {
        "tokens": int(np.count_nonzero(batch["segment_ids"][row])),
        "patches": int(np.count_nonzero(batch["patch_segments"][row])),
        "audio_frames": len(_used(batch["audio_index"][row], budgets.tokens)),
        "audio_targets": len(_used(batch["audio_target_index"][row], budgets.tokens)),
        "text_targets": int(np.count_nonzero(batch["text_weights"][row])),
    }
    # Without a budget of text targets every token may be one.
    room = {"text_targets": budgets.tokens} | budgets.limits()
    return {name: (count, room[name]) for name, count in used.items()}


def _used(slots: Int32[np.ndarray, " n"], length: int) -> Int32[np.ndarray, " m"]:
    return slots[slots < length]


def _images(encoded: EncodedDocument, omni: OmniConfig) -> list[ImageView]:
    views, patch, merged = [], omni.vision.patch_size, omni.vision.merged_patches
    for number in range(1, int(encoded.patch_frames.max(initial=0)) + 1):
        own = np.flatnonzero(encoded.patch_frames == number)
        pixels = reassemble(encoded.patches[own], encoded.patch_grid[own], patch)
        # The center of a token is the mean of its merged patches, in the order that the model merges them.
        corners = encoded.patch_grid[own].reshape(-1, merged, 2)
        centers = ((corners.mean(1) + 0.5) * patch)[:, ::-1].astype(np.float32)
        token = encoded.tokens[encoded.visual_slots[own[0] // merged]]
        views.append(
            ImageView(SlotContent.FRAME if token == omni.tokens.video_place else SlotContent.IMAGE, pixels, centers)
        )
    return views


def _mels(document: Document, processor: Processor) -> list[MelView]:
    # Windows of one clip ascend; where their numbers start again, the next clip begins.
    kinds = [describe(element)[0] for element in processor.elements(document) if isinstance(element, AudioElement)]
    audio = processor.config.audio
    views, clip, previous = [], -1, None
    for item in processor.audio_items(document):
        if previous is None or item.window.index <= previous.window.index:  # windows start again: the next clip
            clip += 1
        previous, window = item, item.window
        wave = decode_audio(item.media, item.samples, audio.sampling_rate)[window.start :][: window.samples]
        seconds = (window.start / audio.sampling_rate, window.samples / audio.sampling_rate)
        views.append(MelView(kinds[clip], item.media.name, log_mel(wave, audio), *seconds, window.code_frames))
    return views
