"""Which windows of sound a mixture refers to: a job over ranges of documents, and the table of what is not stored yet.

Hosts list different ranges. What they find is one table, in the order of sources and documents, each window once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from data_pipelines.audio_codes.clips import REFERENCE, key_fields, new_records
from data_pipelines.datasets.jobs import Job, Unit
from data_pipelines.documents.processor import AudioItem, Processor
from data_pipelines.errors import SampleError
from data_pipelines.packing.index import Index
from data_pipelines.packing.row_limits import BUDGETED
from data_pipelines.pipeline import Pipeline

# Documents of a unit: minutes of work where media are loose files and have to be read to be known.
DOCUMENTS = 10_000
_WINDOWS = BUDGETED.index("mel_windows")


@dataclass(frozen=True)
class ClipSource:
    """One source's documents with the processor that reads them."""

    index: Index
    processor: Processor

    def __len__(self) -> int:
        """Documents and pieces of documents, usable or not."""
        return self.index.total + len(self.index.pieces)

    def with_sound(self, first: int, last: int) -> Int64[np.ndarray, "k"]:
        """The numbers from `first` up to `last` of documents and pieces that rows can hold and that have sound."""
        numbers = np.setdiff1d(np.arange(first, last), self.index.over)
        return numbers[np.array([self.index.needs(number)[_WINDOWS] > 0 for number in numbers.tolist()], bool)]

    def items(self, number: int) -> list[AudioItem]:
        """The windows of sound of a document or piece. Raises SampleError."""
        return self.processor.audio_items(self.index.document(number))


def clip_sources(pipelines: Sequence[Pipeline]) -> tuple[ClipSource, ...]:
    """All sources of these mixtures."""
    return tuple(ClipSource(index, pipeline.processor) for pipeline in pipelines for index in pipeline.indexes)


def mixture_key(pipeline: Pipeline) -> str:
    """Changes with the documents of a mixture and with how they are read."""
    return hashlib.sha256(repr(sorted(pipeline.fingerprint().items())).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ListClips:
    """The work of a listing job: the windows of a range of one source's documents, as a table."""

    sources: tuple[ClipSource, ...]

    def __call__(self, unit: Unit, folder: Path) -> dict:
        source, first, last = unit.content
        numbers = self.sources[source].with_sound(first, last)
        found = [reference for number in numbers.tolist() for reference in self._windows(source, number)]
        np.save(folder / f"{unit.name}.npy", np.array(found, REFERENCE))
        return {"windows": len(found)}

    def _windows(self, source: int, number: int) -> list[tuple]:
        """A document whose media changed since it was indexed has none here: decoding it tells."""
        try:
            items = self.sources[source].items(number)
            return [(*key_fields(item.key), item.window.code_frames, source, number) for item in items]
        except SampleError:
            return []


def listing_job(pipelines: Sequence[Pipeline], out: Path, documents: int = DOCUMENTS) -> Job:
    """The job that lists the sound of these mixtures into `out`, `documents` of a source at a time."""
    sources = clip_sources(pipelines)
    key = hashlib.sha256(repr([mixture_key(pipeline) for pipeline in pipelines]).encode()).hexdigest()
    units = [
        Unit(f"clips-{number:03d}-{first:010d}", f"{key} {number} {first}", (number, first, last), last - first)
        for number, source in enumerate(sources)
        for first in range(0, len(source), documents)
        for last in [min(first + documents, len(source))]
    ]
    return Job("listing sound", units, ListClips(sources), out)


def listed(job: Job, known: Shaped[np.ndarray, "m"]) -> Shaped[np.ndarray, "n"]:
    """The windows that a finished listing found and the index `known` lacks, each with the first document of it."""
    tables = [np.load(job.out / f"{unit.name}.npy") for unit in job.units]
    table = np.concatenate([np.zeros(0, REFERENCE), *tables])
    return table[new_records(table, known)]
