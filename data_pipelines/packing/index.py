"""What every document of a source takes of each budget: what mixture, shuffle and packing work on.

Measured once from headers and cached (index_build.py), so that rows are planned before anything is decoded. Documents
that cannot be used are named with their cause, so that every manifest line ends up in a row or in a count.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from baichuan_omni_jax.config import Budgets
from data_pipelines.datasets.sources import Source
from data_pipelines.documents.document import Document
from data_pipelines.errors import first_of_causes
from data_pipelines.packing.columns import SKIPPED_FILE, Columns
from data_pipelines.packing.mixture import DocumentLengths
from data_pipelines.packing.pieces import NO_PIECES, Pieces
from data_pipelines.packing.row_limits import AUDIO_TARGETS, RowLimits

_CHUNK = 1 << 20  # documents looked at together: what memory that takes does not grow with the index


@dataclass(frozen=True)
class Skipped:
    """A document that no row will hold: its manifest line, and why."""

    location: str
    cause: str
    message: str


@dataclass(frozen=True)
class Index:
    """One source's documents, `total` of them, numbered from 0.

    `over` are those that an empty row of `limits` cannot hold, ascending; `pieces` what is made of them, numbered from
    `total` on. Picklable: columns go as the name of their folder.
    """

    name: str
    source: Source
    columns: Columns
    limits: RowLimits | None = None
    over: Int64[np.ndarray, "o"] = field(default_factory=lambda: np.zeros(0, np.int64))
    pieces: Pieces = NO_PIECES

    @property
    def manifest(self) -> str:
        return self.source.path

    @property
    def total(self) -> int:
        return len(self.columns)

    @property
    def usable(self) -> int:
        """Documents, and pieces of documents, that rows can hold."""
        return self.total - len(self.over) + len(self.pieces)

    @property
    def documents(self) -> int:
        """Manifest lines or records, usable or not."""
        return self.total + sum(self.columns.meta.get("causes", {}).values())

    @property
    def digest(self) -> str:
        """Differs between indexes whose documents, pieces or lengths differ."""
        pieces = self.pieces
        parts = (self.over, pieces.documents, pieces.turns, pieces.max_frames, pieces.spans)
        own = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        return f"{self.columns.meta.get('digest', '')} {own[:12]}"

    def numbers(self) -> Iterator[int]:
        """Numbers of all usable documents and pieces, ascending."""
        over = iter(self.over.tolist())
        gap = next(over, None)
        for number in range(self.total + len(self.pieces)):
            if number == gap:
                gap = next(over, None)
            else:
                yield number

    def document(self, number: int) -> Document:
        """The document or piece `number`, read from its source."""
        if number >= self.total:
            piece = number - self.total
            return self.pieces.cut(piece, self.document(self.pieces.document(piece)))
        return self.source.document(int(self.columns.places[number]), int(self.columns.numbers[number]))

    def location(self, number: int) -> str:
        """The manifest line or the record of a document or piece."""
        number = self.base(number)
        return self.source.location(int(self.columns.places[number]), int(self.columns.numbers[number]))

    def base(self, number: int) -> int:
        """The document that `number` is, or is a piece of."""
        return number if number < self.total else self.pieces.document(number - self.total)

    def lengths(self, number: int) -> Int32[np.ndarray, "budgets"]:
        """What `number` takes of the budgets, in the order of `Budgets`' fields."""
        columns, place = self._columns_of(number)
        return columns.lengths[place]

    def text_targets(self, number: int) -> int:
        """How many text targets `number` has."""
        columns, place = self._columns_of(number)
        return int(columns.text_targets[place])

    def image_patches(self, number: int) -> list[int]:
        """Patches of each picture and video frame of `number`, in order."""
        columns, place = self._columns_of(number)
        return columns.patches_of(place)

    def expand(self, numbers: Int64[np.ndarray, "k"]) -> list[list[DocumentLengths]]:
        """Gives documents as they are, pieces of those that are too long, or nothing (`mixture.Documents`)."""
        found = [[each] for each in _measured(self.columns, numbers, 0)]
        if len(self.over):
            at = np.searchsorted(self.over, numbers).clip(max=len(self.over) - 1)
            for place in np.flatnonzero(self.over[at] == numbers).tolist():
                own = self.pieces.for_document(int(numbers[place]))
                found[place] = _measured(self.pieces.columns, np.arange(own.start, own.stop), self.total)
        return found

    def document_lengths(self, number: int) -> DocumentLengths:
        """The document or piece `number`."""
        needs = tuple(self.lengths(number).tolist())
        return DocumentLengths(
            number, needs, self.image_patches(number), self.text_targets(number) + needs[AUDIO_TARGETS]
        )

    def within(self, budgets: Budgets, media_shards: int = 1) -> "Index":
        """The same index for rows of these budgets, their patches in `media_shards` parts that hold whole pictures.

        Documents that an empty row cannot hold are skipped as `too_long`. No column is copied.
        """
        limits, over = RowLimits(budgets, media_shards), []
        for start in range(0, self.total, _CHUNK):
            places = np.asarray(self.columns.image_offsets[start : start + _CHUNK + 1])
            pictures = self.columns.image_patches[places[0] : places[-1]]
            needs = self.columns.lengths[start : start + _CHUNK]
            over.append(start + np.flatnonzero(limits.exceeds(needs, pictures, np.diff(places))))
        beyond = np.concatenate([np.zeros(0, np.int64), *over])
        return replace(self, limits=limits, over=beyond, pieces=NO_PIECES)

    @property
    def skipped(self) -> Iterator[Skipped]:
        """Every document that no row will hold: those that cannot be used, then those that are too long."""
        if self.skipped_file is not None:
            with self.skipped_file.open(encoding="utf-8") as file:
                yield from (Skipped(*json.loads(line)) for line in file)
        for number in self.over.tolist():
            message = self.pieces.left.get(number)
            if message or not len(self.pieces.for_document(number)):
                message = message or self.limits.why_exceeds(self.lengths(number).tolist(), self.image_patches(number))
                yield Skipped(self.location(number), "too_long", message)

    @property
    def skipped_file(self) -> Path | None:
        """Names every document that cannot be used, whatever the budgets."""
        return None if self.columns.folder is None else self.columns.folder / SKIPPED_FILE

    def causes(self) -> Counter:
        """How many documents were skipped for each cause."""
        causes = Counter(self.columns.meta.get("causes", {}))
        causes["too_long"] = len(self.over) - self.pieces.rescued
        return +causes

    def examples(self) -> dict[str, str]:
        """For each cause, one of the documents that were skipped for it and the reason, as one sentence."""
        found = ((item.location, item.cause, item.message) for item in self.skipped)
        return first_of_causes(found, self.causes())

    def why_unusable(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in self.causes().most_common())
        return f"skipped {causes} of {self.manifest}" if causes else f"{self.manifest} is empty"

    def _columns_of(self, number: int) -> tuple[Columns, int]:
        return (self.columns, number) if number < self.total else (self.pieces.columns, number - self.total)


def _measured(columns: Columns, places: Int64[np.ndarray, "k"], first: int) -> list[DocumentLengths]:
    """Documents at these places of columns; the document at 0 has the number `first`."""
    needs = columns.lengths[places].tolist()
    starts, ends = columns.image_offsets[places].tolist(), columns.image_offsets[places + 1].tolist()
    texts = columns.text_targets[places].tolist()
    return [
        DocumentLengths(
            first + place,
            tuple(need),
            columns.image_patches[start:end].tolist() if end > start else [],
            text + need[AUDIO_TARGETS],
        )
        for place, need, start, end, text in zip(places.tolist(), needs, starts, ends, texts, strict=True)
    ]
