"""Log-mels of many windows of sound, decoded by worker processes ahead of whoever reads them, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from baichuan_omni_jax.audio.config import AudioConfig
from data_pipelines.audio_codes.clips import key_fields
from data_pipelines.audio_codes.listing import ClipSource
from data_pipelines.datasets.jobs.local import HeldPool
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_sound
from data_pipelines.media.features import log_mel

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

    def __call__(self, table: Shaped[np.ndarray, "n"]) -> Iterator[tuple[int, Outcome]]:
        """(row, log-mel or why there is none) of every row of a table of references, in order."""
        for task, outcomes in self._in_order(_tasks(table)):
            yield from zip(task.rows, outcomes, strict=True)

    def _in_order(self, tasks: Iterator[_Task]) -> Iterator[tuple[_Task, list[Outcome]]]:
        if not self._workers:
            yield from ((task, self._decode(task)) for task in tasks)
            return
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
        """Each of the task's windows, decoded once a clip."""
        try:
            items = {key_fields(item.key): item for item in self.sources[task.source].items(task.document)}
        except SampleError as error:
            return [error] * len(task.keys)
        waves: dict[tuple[int, int], Any] = {}
        return [self._mel(items.get(key), waves, key) for key in task.keys]

    def _mel(self, item: Any, waves: dict, key: tuple[int, int, int]) -> Outcome:
        if item is None:
            return SampleError("changed", "its sound is not what it was a moment ago")
        clip = key[:2]
        try:
            if clip not in waves:
                waves.clear()
                waves[clip] = decode_sound(item.media, item.samples, self.audio.sampling_rate)
            window = item.window
            return log_mel(waves[clip][window.start : window.start + window.samples], self.audio)
        except SampleError as error:
            return error


# What a worker process decodes with: sent once, when it starts.
_decode: Callable[[_Task], list[Outcome]] | None = None


def _start(decode: _Decoder) -> None:
    global _decode
    _decode = decode


def _work(task: _Task) -> list[Outcome]:
    return _decode(task)


def _tasks(table: Shaped[np.ndarray, "n"]) -> Iterator[_Task]:
    """Rows of the same document together, at most `WINDOWS` of them."""
    group: list[tuple[int, tuple]] = []
    for row, record in _records(table):
        if group and (record[4:] != group[0][1][4:] or len(group) == WINDOWS):
            yield _task(group)
            group = []
        group.append((row, record))
    if group:
        yield _task(group)


def _records(table: Shaped[np.ndarray, "n"]) -> Iterable[tuple[int, tuple]]:
    return ((row, record.item()) for row, record in enumerate(table))


def _task(group: list[tuple[int, tuple]]) -> _Task:
    source, document = group[0][1][4:]
    rows, keys = zip(*((row, record[:3]) for row, record in group), strict=True)
    return _Task(source, document, rows, keys)
