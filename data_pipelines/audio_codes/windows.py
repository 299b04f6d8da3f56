"""The windows of audio that a mixture refers to: listed by ranges of documents, decoded to log-mels in order.

Hosts list different ranges; what they find is one table, in the order of sources and documents, each window once. Mels
are decoded by worker processes ahead of whoever reads them.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped

from baichuan_omni_jax.config.architecture import AudioConfig
from data_pipelines.audio_codes.store import REFERENCE, key_fields, new_records
from data_pipelines.datasets.jobs.job import Job, Unit
from data_pipelines.datasets.jobs.runners import HeldPool
from data_pipelines.documents.media_items import AudioItem
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio
from data_pipelines.media.features import log_mel
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

    def with_audio(self, first: int, last: int) -> Int64[np.ndarray, " k"]:
        """Returns the numbers from `first` up to `last` of documents and pieces that rows can hold and that
        have audio.
        """
        # Documents too large for a row never need codes.
        numbers = np.setdiff1d(np.arange(first, last), self.index.over)
        return numbers[np.array([self.index.lengths(number)[_WINDOWS] > 0 for number in numbers.tolist()], bool)]

    def items(self, number: int) -> list[AudioItem]:
        """Returns the windows of audio of a document or piece. Raises SampleError."""
        return self.processor.audio_items(self.index.document(number))


def clip_sources(pipelines: Sequence[Pipeline]) -> tuple[ClipSource, ...]:
    """Returns all sources of these mixtures."""
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
        numbers = self.sources[source].with_audio(first, last)
        found = [reference for number in numbers.tolist() for reference in self._windows(source, number)]
        np.save(folder / f"{unit.name}.npy", np.array(found, REFERENCE))
        return {"windows": len(found)}

    def _windows(self, source: int, number: int) -> list[tuple]:
        """Lists the windows of one document; one whose media changed since it was indexed has none: decoding it
        tells.
        """
        try:
            items = self.sources[source].items(number)
            return [(*key_fields(item.key), item.window.code_frames, source, number) for item in items]
        except SampleError:
            return []


def listing_job(pipelines: Sequence[Pipeline], out: Path, documents: int = DOCUMENTS) -> Job:
    """Returns the job that lists the audio of these mixtures into `out`, `documents` of a source at a time."""
    sources = clip_sources(pipelines)
    key = hashlib.sha256(repr([mixture_key(pipeline) for pipeline in pipelines]).encode()).hexdigest()
    units = [
        Unit(f"clips-{number:03d}-{first:010d}", f"{key} {number} {first}", (number, first, last), last - first)
        for number, source in enumerate(sources)
        for first in range(0, len(source), documents)
        for last in [min(first + documents, len(source))]
    ]
    return Job("listing audio", units, ListClips(sources), out)


def listed(job: Job, known: Shaped[np.ndarray, " m"]) -> Shaped[np.ndarray, " n"]:
    """Returns the windows that a finished listing found and the index `known` lacks, each with the first document of
    it.
    """
    # In the order of the units, which is that of the documents: the first document with a clip stands for it.
    tables = [np.load(job.out / f"{unit.name}.npy") for unit in job.units]
    table = np.concatenate([np.zeros(0, REFERENCE), *tables])
    return table[new_records(table, known)]


# Windows of one document that are decoded at once: 16 minutes, 50 MB of mel. A longer clip is decoded once for each.
WINDOWS = 32
AHEAD = 4  # tasks a worker that may be waiting, done or not: it bounds what is in memory
ATTEMPTS = 2  # at a document whose decoding ends its process

# A log-mel, or why there is none.
Outcome = Float[np.ndarray, "mels f"] | SampleError


@dataclass(frozen=True)
class _Task:
    """Windows of one document: their rows in the table, and `high`, `low`, `window` of each."""

    source: int
    document: int
    rows: tuple[int, ...]
    keys: tuple[tuple[int, int, int], ...]


class MelReader:
    """Reads windows in `workers` processes (0: in this one). A context manager; closing it ends them.

    A file that ends the process that decodes it costs its own windows alone.
    """

    def __init__(self, sources: tuple[ClipSource, ...], audio: AudioConfig, workers: int):
        self._decode, self._workers = _Decoder(sources, audio), workers
        self._pool: HeldPool | None = None

    def __enter__(self) -> "MelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, table: Shaped[np.ndarray, " n"]) -> Iterator[tuple[int, Outcome]]:
        """Yields (row, log-mel or why there is none) of every row of a table of references, in order."""
        for task, outcomes in self._in_order(_tasks(table)):
            yield from zip(task.rows, outcomes, strict=True)

    def _in_order(self, tasks: Iterator[_Task]) -> Iterator[tuple[_Task, list[Outcome]]]:
        if not self._workers:
            yield from ((task, self._decode(task)) for task in tasks)
            return
        # A window of tasks under way, read in order: workers are never idle, memory is bounded by `AHEAD`.
        waiting: deque[tuple[_Task, Future]] = deque()
        while True:
            while len(waiting) < AHEAD * self._workers and (task := next(tasks, None)):
                waiting.append((task, self._submit(task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                yield task, future.result()
            except BrokenProcessPool:
                # One of those under way did it. One at a time they tell which.
                again = [task, *(other for other, _ in waiting)]
                waiting.clear()
                self._stop()
                yield from ((each, self._alone(each)) for each in again)

    def _alone(self, task: _Task) -> list[Outcome]:
        # More than once: a process may also die of memory that others took.
        for _ in range(ATTEMPTS):
            try:
                return self._submit(task).result()
            except BrokenProcessPool:
                self._stop()
        return [SampleError("unreadable_media", "decoding it ends the process")] * len(task.rows)

    def _submit(self, task: _Task) -> Future:
        if self._pool is None:
            self._pool = HeldPool(self._workers, _start, (self._decode,))
        try:
            return self._pool.submit(_work, task)
        except BrokenProcessPool as error:
            broken = Future()
            broken.set_exception(error)
            return broken

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@dataclass(frozen=True)
class _Decoder:
    sources: tuple[ClipSource, ...]
    audio: AudioConfig

    def __call__(self, task: _Task) -> list[Outcome]:
        """Decodes the task's windows, each clip once."""
        try:
            items = {key_fields(item.key): item for item in self.sources[task.source].items(task.document)}
        except SampleError as error:
            return [error] * len(task.keys)
        # Windows of one clip follow each other, so one decoded clip is held at a time.
        waves: dict[tuple[int, int], Any] = {}
        return [self._mel(items.get(key), waves, key) for key in task.keys]

    def _mel(self, item: Any, waves: dict, key: tuple[int, int, int]) -> Outcome:
        if item is None:
            return SampleError("changed", "its audio is not what it was a moment ago")
        clip = key[:2]
        try:
            if clip not in waves:
                waves.clear()
                waves[clip] = decode_audio(item.media, item.samples, self.audio.sampling_rate)
            window = item.window
            return log_mel(waves[clip][window.start : window.start + window.samples], self.audio)
        except SampleError as error:
            return error


# What a worker process decodes with: sent once, when it starts.
_decode: Callable[[_Task], list[Outcome]]


def _start(decode: _Decoder) -> None:
    global _decode
    _decode = decode


def _work(task: _Task) -> list[Outcome]:
    return _decode(task)


def _tasks(table: Shaped[np.ndarray, " n"]) -> Iterator[_Task]:
    """Groups rows of the same document, at most `WINDOWS` of them."""
    group: list[tuple[int, tuple]] = []
    for row, record in ((row, record.item()) for row, record in enumerate(table)):
        if group and (record[4:] != group[0][1][4:] or len(group) == WINDOWS):
            yield _task(group)
            group = []
        group.append((row, record))
    if group:
        yield _task(group)


def _task(group: list[tuple[int, tuple]]) -> _Task:
    source, document = group[0][1][4:]
    rows, keys = zip(*((row, record[:3]) for row, record in group), strict=True)
    return _Task(source, document, rows, keys)
