"""Steps of packed rows: planned alike on every host, decoded by Grain workers, each host its own rows.

The plan is cheap arithmetic, so every worker runs it whole and decodes every n-th step. With each step comes the
plan's state after it, which holds for all hosts, so a run resumes with other workers, hosts or mesh.
"""

import atexit
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jaxtyping import Int32

from baichuan_omni_jax.config import Budgets, DataConfig, OmniConfig
from baichuan_omni_jax.storage.cache import Prefetcher
from data_pipelines.documents.document import Document, Lengths
from data_pipelines.documents.media_items import Codes
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.sequence import weigh
from data_pipelines.errors import SampleError
from data_pipelines.packing.batch import Batch, ContextPlan, RowWriter, empty_rows
from data_pipelines.packing.row_limits import BUDGETED, MelSlots, PatchLayout, row_key
from data_pipelines.packing.step_plan import PackedRow, StepPlan

_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
AHEAD = 4  # steps of a worker whose documents are fetched before they are decoded
_AUDIO_FRAMES = BUDGETED.index("audio_frames")


@dataclass(frozen=True)
class Step:
    """One step's rows of this host: the batch, the documents that failed to decode, and the plan's state after it.

    `failed` maps (source, document) to (manifest line, cause, message); their places are padding. `damaged` maps
    (source, document) to the packets of its media that could not be decoded; the document is used without them.
    """

    batch: Batch  # this host's rows
    failed: dict[tuple[int, int], tuple[str, str, str]]
    state: dict  # the plan's state after the step, of all hosts
    damaged: dict[tuple[int, int], int] = field(default_factory=dict)


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

    def decode(self, rows: list[PackedRow], mel_frames: int = 0) -> tuple[Batch, dict, dict]:
        """Decodes the batch of `rows` as above, `failed` and `damaged` as in `Step`."""
        batch, failed, damaged = empty_rows(len(rows), self.budgets, self.omni, mel_frames, self.mels), {}, {}
        for number, row in enumerate(rows):
            writer = RowWriter(batch, number, self.mels, row_key(row))
            for key, image_starts in zip(row, self._place_images(row), strict=True):
                self._add(writer, key, image_starts, failed, damaged)
        # Dealt by the lengths that were planned, so that hosts agree whatever each of them could read.
        tokens = [[int(self.indexes[source].lengths(number)[0]) for source, number in row] for row in rows]
        return self.context.deal(batch, tokens), failed, damaged

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

    def _add(
        self, writer: RowWriter, key: tuple[int, int], image_starts: np.ndarray, failed: dict, damaged: dict
    ) -> None:
        source, number = key
        index = self.indexes[source]
        lengths = index.lengths(number)
        try:
            with_mels = self.budgets.mel_windows > 0
            rates = self.mels.rates if with_mels else ()
            encoded = self.processor.encode(index.document(number), self.codes, mels=with_mels, rates=rates)
            # A file that changed since it was measured would shift everything behind it in the row.
            if not _as_measured(encoded.lengths, index, number):
                raise SampleError("changed", "the document is not what the index measured")
        except SampleError as error:
            failed[key] = (index.location(number), error.cause, str(error))
            writer.skip(int(lengths[0]))
            return
        if encoded.damaged_packets:
            damaged[key] = encoded.damaged_packets
        weighed = weigh(encoded, self.weighting, self.loss_weights[source], self.untrained_targets)
        writer.add(weighed, source=source, number=number, image_starts=image_starts)


def _as_measured(found: Lengths, index: RowDocuments, number: int) -> bool:
    sizes = [found.tokens, found.patches, found.audio_frames, found.audio_targets, found.text_targets]
    as_long = sizes == index.lengths(number)[: len(sizes)].tolist()
    return as_long and list(found.image_patches) == index.image_patches(number)


@dataclass(frozen=True)
class RowShard:
    """Which rows of every global step a host decodes, by their place in it; None: all."""

    rows: tuple[int, ...] | None = None

    def select(self, rows: list[PackedRow]) -> list[PackedRow]:
        return rows if self.rows is None else [rows[place] for place in self.rows]


ALL_ROWS = RowShard()


class StepDataset(grain.IterDataset):
    """Grain's view of the plan: element = one step, decoded. `set_slice` makes a worker decode every n-th step.

    Args:
        plan: makes the plan, anew in every worker.
        decode: decodes rows.
        shard: which rows of a step this host has.
        state: where the plan goes on; None: at its start.
    """

    def __init__(self, plan: Callable[[], StepPlan], decode: RowDecoder, shard: RowShard, state: dict | None = None):
        super().__init__()
        self._plan, self._decode, self._shard, self._state = plan, decode, shard, state
        self._slice = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        del sequential_slice
        self._slice = sl

    def __iter__(self) -> "StepIterator":
        plan = self._plan()
        if self._state is not None:
            plan.restore(self._state)
        return StepIterator(plan, self._decode, self._shard, self._slice)


class StepIterator(grain.DatasetIterator):
    """Plans every step, decodes those of its slice. A finite plan's last step may have fewer rows (one host only)."""

    def __init__(self, plan: StepPlan, decode: RowDecoder, shard: RowShard, sl: slice):
        super().__init__()
        self._plan, self._decode, self._shard = plan, decode, shard
        self._skip, self._stride = sl.start or 0, sl.step or 1
        self._given = {"plan": plan.state, "skip": self._skip}
        # Steps that are planned and not decoded yet, where their documents have to be fetched.
        self._planned: deque[tuple[list[PackedRow], dict]] = deque()
        self._prefetch = Prefetcher() if decode.remote else None

    def __next__(self) -> dict:
        while self._prefetch is not None and len(self._planned) < AHEAD:
            if (step := self._next_step()) is None:
                break
            self._planned.append(step)
            for fetch in self._decode.fetches(self._shard.select(step[0])):
                self._prefetch(fetch)
        step = self._planned.popleft() if self._planned else self._next_step()
        if step is None:
            raise StopIteration
        rows, state = step
        self._given = {"plan": state, "skip": self._stride - 1}
        batch, failed, damaged = self._decode.decode(self._shard.select(rows), self._decode.mel_frames(rows))
        outcome = {"failed": [[key, why] for key, why in failed.items()], "damaged": list(damaged.items())}
        # Grain hands arrays from process to process: what else belongs to the step goes along as bytes.
        info = json.dumps({"state": state} | outcome)
        return {"batch": batch, "info": np.frombuffer(info.encode(), np.uint8)}

    def _next_step(self) -> tuple[list[PackedRow], dict] | None:
        """Plans up to the next step of this worker; returns its rows and the plan's state after it, None at the end."""
        # Steps of other workers are planned, which is cheap, and not decoded.
        try:
            for _ in range(self._skip):
                next(self._plan)
            rows = next(self._plan)
        except StopIteration:
            return None
        self._skip = self._stride - 1
        return rows, self._plan.state

    def get_state(self) -> dict:
        """Returns what Grain asks each worker for; a run keeps `Step.state`, which holds for any number of workers."""
        return self._given

    def set_state(self, state: dict) -> None:
        self._plan.restore(state["plan"])
        self._given, self._skip = state, state["skip"]
        self._planned.clear()


MOST_WORKERS, OTHER_CORES = 64, 8  # processes of a host that "auto" starts, and cores that it leaves alone
_STEPS_HELD = 3  # by a worker: two that are done, and one in the making


def worker_count(config: DataConfig) -> int:
    """Returns how many processes decode rows on this host: `data.workers`, or for "auto" what its cores allow.

    All cores but 8, at least 2 and at most 64; fewer where the steps that they hold, of all the rows of a step, would
    take more than a quarter of the memory.
    """
    if config.workers != "auto":
        return config.workers
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = min(MOST_WORKERS, max(2, cores - OTHER_CORES))
    # Patches and mels are nearly all of a row.
    budgets = config.budgets
    a_row = budgets.patches * 600 + budgets.mel_windows * max(config.mel_frames, default=0) * 512 + budgets.tokens * 64
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(workers, memory // 4 // max(1, _STEPS_HELD * config.rows * a_row)))


def read_steps(dataset: StepDataset, workers: int) -> Iterator[Step]:
    """Yields steps in order, decoded by `workers` processes (0: in this one)."""
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; outside an absl app nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        # Processes are what decodes in parallel: a BLAS of several threads in each of them waits by spinning, on the
        # cores that train. This process has read these variables already.
        for variable in _BLAS_THREADS:
            os.environ.setdefault(variable, "1")
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        elements = iter(dataset.mp_prefetch(options, _end_with_parent))
    else:
        elements = iter(dataset)
    try:
        for element in elements:
            info = json.loads(bytes(element["info"]))
            failed = {(source, number): tuple(why) for (source, number), why in info["failed"]}
            damaged = {(source, number): packets for (source, number), packets in info["damaged"]}
            yield Step(element["batch"], failed, info["state"], damaged)
    finally:
        elements.close()  # ends the workers when the reader stops early


@atexit.register
def free_shared_memory() -> None:
    """Waits, 10 s at most, until the shared memory of batches that nobody holds any more is free.

    Grain frees it in a thread, which the end of the program would cut off; Python then warns of what was leaked.
    """
    thread = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if thread is not None:
        thread.apply_async(int).wait(10)


def _end_with_parent(*_: int) -> None:
    """Ends a worker when the process that started it was killed, where Grain's would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
