"""From planned rows to their arrays: each document decoded into its place, or padding where it cannot be.

Hosts that share a row compare what they decoded by a digest of each of its documents (`shared_rows`).
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from baichuan_omni_jax.config import Budgets, OmniConfig
from data_pipelines.documents.document import Document, EncodedDocument, Lengths
from data_pipelines.documents.media_items import Codes
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.sequence import weigh
from data_pipelines.errors import SampleError
from data_pipelines.packing.batch import Batch, ContextPlan, RowWriter, empty_rows
from data_pipelines.packing.row_limits import BUDGETED, MelSlots, PatchLayout, row_key
from data_pipelines.packing.step_plan import PackedRow

_AUDIO_FRAMES = BUDGETED.index("audio_frames")


@dataclass(frozen=True)
class SharedRow:
    """The documents of a row, and a digest of each as this host decoded it; None: lost."""

    row: PackedRow
    digests: tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """One step's rows of this host: the batch, the documents that failed to decode, and the plan's state after it.

    `failed` maps (source, document) to (manifest line, cause, message); their places are padding. `damaged` maps
    (source, document) to the packets of its media that could not be decoded; the document is used without them.
    `shared` has the rows that other hosts decode too, by their place among all hosts' rows.
    """

    batch: Batch  # this host's rows
    failed: dict[tuple[int, int], tuple[str, str, str]]
    state: dict  # the plan's state after the step, of all hosts
    damaged: dict[tuple[int, int], int] = field(default_factory=dict)
    shared: dict[int, SharedRow] = field(default_factory=dict)


class DecodedRows(NamedTuple):
    """What rows were decoded to: `failed` and `damaged` as in `Step`, and digests of the rows they were asked for."""

    batch: Batch
    failed: dict[tuple[int, int], tuple[str, str, str]]
    damaged: dict[tuple[int, int], int]
    digests: dict[int, tuple[int | None, ...]]  # of each document of a row, by the row's place; None: lost


@runtime_checkable
class RowDocuments(Protocol):
    """What rows are decoded from: documents by number, with what was measured of them. An `Index` is one."""

    def document(self, number: int) -> Document: ...

    def location(self, number: int) -> str: ...

    def lengths(self, number: int) -> Int32[np.ndarray, "budgets"]: ...

    def image_patches(self, number: int) -> list[int]: ...

    @property
    def remote(self) -> bool: ...

    def fetch(self, number: int) -> None: ...


@dataclass(frozen=True)
class RowDecoder:
    """Turns planned rows into a batch. Picklable: it goes to the workers."""

    indexes: tuple[RowDocuments, ...]  # of the sources, in their order
    processor: Processor
    codes: Codes | None  # the store of audio codes; None: zeros
    budgets: Budgets
    omni: OmniConfig
    layout: PatchLayout  # where images lie
    context: ContextPlan  # which shard of the mesh gets which tokens
    mels: MelSlots  # what mel slots show
    loss_weights: tuple[float, ...]  # the sources' own
    weighting: str = "token"  # `train.document_weighting`
    untrained_targets: tuple[int, ...] = ()  # special tokens that no loss asks for

    def __call__(self, rows: list[PackedRow], mel_frames: int = 0) -> tuple[Batch, dict]:
        """Decodes the batch of `rows`, its mel slots of `mel_frames`, and the documents that could not be decoded."""
        return self.decode(rows, mel_frames)[:2]

    def decode(
        self,
        rows: list[PackedRow],
        mel_frames: int = 0,
        *,
        digested: Collection[int] = (),
        dropped: Mapping[int, Collection[int]] | None = None,
    ) -> DecodedRows:
        """Decodes rows.

        Args:
            rows: the documents of each.
            mel_frames: frames of a mel slot.
            digested: which rows get digests of their documents, by their places in `rows`.
            dropped: documents that are left out, padding in their place: row -> their places in it.
        """
        batch, digests = empty_rows(len(rows), self.budgets, self.omni, mel_frames, self.mels), {}
        failed, damaged, dropped = {}, {}, dropped or {}
        for number, row in enumerate(rows):
            writer, found = RowWriter(batch, number, self.mels, row_key(row)), []
            for place, (key, image_starts) in enumerate(zip(row, self._place_images(row), strict=True)):
                document = None if place in dropped.get(number, ()) else self._encode(key, failed)
                if document is None:
                    writer.skip(int(self.indexes[key[0]].lengths(key[1])[0]))
                else:
                    self._write(writer, key, document, image_starts, damaged)
                if number in digested:
                    found.append(None if document is None else content_digest(document))
            if number in digested:
                digests[number] = tuple(found)
        # Dealt by the lengths that were planned, so that hosts agree whatever each of them could read.
        tokens = [[int(self.indexes[source].lengths(number)[0]) for source, number in row] for row in rows]
        return DecodedRows(self.context.deal(batch, tokens), failed, damaged, digests)

    @property
    def remote(self) -> bool:
        """Whether documents have to be fetched before they are read."""
        return any(index.remote for index in self.indexes)

    def fetches(self, rows: list[PackedRow]) -> Iterator[Callable[[], None]]:
        """Yields what brings the documents of `rows` to this machine, in their order."""
        for row in rows:
            for source, number in row:
                if self.indexes[source].remote:
                    yield partial(self.indexes[source].fetch, number)

    def mel_frames(self, rows: list[PackedRow]) -> int:
        """Returns the size of the mel slots of a step of these rows, all hosts' among them; 0 without mel slots."""
        if not self.budgets.mel_windows:
            return 0
        lengths = [self.indexes[source].lengths(number) for row in rows for source, number in row]
        return self.mels.size(max((int(need[_AUDIO_FRAMES]) for need in lengths), default=0))

    def _place_images(self, row: PackedRow) -> list[Int32[np.ndarray, "_"]]:
        """Returns the first patch of each image of each document, as the plan foresaw them."""
        if not row:  # of a list of documents that does not fill a step
            return []
        sizes = [self.indexes[source].image_patches(number) for source, number in row]
        starts = self.layout.starts([size for document in sizes for size in document])
        return np.split(starts, np.cumsum([len(document) for document in sizes])[:-1])

    def _encode(self, key: tuple[int, int], failed: dict) -> EncodedDocument | None:
        """Encodes a document; None where it cannot be, with the reason in `failed`."""
        source, number = key
        index = self.indexes[source]
        try:
            with_mels = self.budgets.mel_windows > 0
            rates = self.mels.rates if with_mels else ()
            encoded = self.processor.encode(index.document(number), self.codes, mels=with_mels, rates=rates)
            # A file that changed since it was measured would shift everything behind it in the row.
            if not _as_measured(encoded.lengths, index, number):
                raise SampleError("changed", "the document is not what the index measured")
        except SampleError as error:
            failed[key] = (index.location(number), error.cause, str(error))
            return None
        return encoded

    def _write(
        self,
        writer: RowWriter,
        key: tuple[int, int],
        document: EncodedDocument,
        image_starts: np.ndarray,
        damaged: dict[tuple[int, int], int],
    ) -> None:
        source, number = key
        if document.damaged_packets:
            damaged[key] = document.damaged_packets
        weighed = weigh(document, self.weighting, self.loss_weights[source], self.untrained_targets)
        writer.add(weighed, source=source, number=number, image_starts=image_starts)


def _as_measured(found: Lengths, index: RowDocuments, number: int) -> bool:
    sizes = [found.tokens, found.patches, found.audio_frames, found.audio_targets, found.text_targets]
    as_long = sizes == index.lengths(number)[: len(sizes)].tolist()
    return as_long and list(found.image_patches) == index.image_patches(number)


def content_digest(document: EncodedDocument) -> int:
    """Returns a checksum of all that a row takes of a document."""
    found = 0
    arrays = [value for value in vars(document).values() if isinstance(value, np.ndarray)]
    arrays += [*document.mels, *(wave for waves in document.waves for _, wave in sorted(waves.items()))]
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found
