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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.storage.cache import Prefetcher
from data_pipelines.packing.row_decoder import RowDecoder, SharedRow, Step
from data_pipelines.packing.shared_rows import Agreement
from data_pipelines.packing.step_plan import PackedRow, StepPlan

_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
AHEAD = 4  # steps of a worker whose documents are fetched before they are decoded


@dataclass(frozen=True)
class RowShard:
    """Which rows of every global step a host decodes, by their place in it; None: all.

    `shared` are those that other hosts decode as well, which `agreement` makes alike; workers have none.
    """

    rows: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()
    agreement: Agreement | None = None

    def select(self, rows: list[PackedRow]) -> list[PackedRow]:
        return rows if self.rows is None else [rows[place] for place in self.rows]

    def agree(self, steps: Iterator[Step], decoder: RowDecoder, ahead: int = 0) -> Iterator[Step]:
        """Returns `steps` with shared rows that are alike on all their hosts (`Agreement.agree`)."""
        return steps if self.agreement is None else self.agreement.agree(steps, decoder, ahead)

    def union(self, lost: Mapping[int, str]) -> dict[int, str]:
        """Returns the causes of all hosts' lost documents by number (`Agreement.union`)."""
        return dict(lost) if self.agreement is None else self.agreement.union(lost)


ALL_ROWS = RowShard()


def decode_step(decoder: RowDecoder, shard: RowShard, rows: list[PackedRow], state: dict, mel_frames: int = 0) -> Step:
    """Decodes a host's rows of a step.

    Args:
        decoder: what decodes them.
        shard: which of `rows` they are.
        rows: those of all hosts.
        state: the plan's state after the step.
        mel_frames: frames of a mel slot.
    """
    places = {row: place for place, row in enumerate(shard.rows or ())}
    own = [places[row] for row in shard.shared]
    selected = shard.select(rows)
    batch, failed, damaged, digests = decoder.decode(selected, mel_frames, digested=own)
    shared = {row: SharedRow(rows[row], digests[places[row]]) for row in shard.shared}
    return Step(batch, failed, state, damaged, shared)


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
        decoded = decode_step(self._decode, self._shard, rows, state, self._decode.mel_frames(rows))
        # Grain hands arrays from process to process: what else belongs to the step goes along as bytes.
        info = {
            "state": state,
            "failed": list(decoded.failed.items()),
            "damaged": list(decoded.damaged.items()),
            "shared": [[place, found.row, found.digests] for place, found in decoded.shared.items()],
        }
        return {"batch": decoded.batch, "info": np.frombuffer(json.dumps(info).encode(), np.uint8)}

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
            shared = {
                place: SharedRow([(source, number) for source, number in row], tuple(digests))
                for place, row, digests in info["shared"]
            }
            yield Step(element["batch"], failed, info["state"], damaged, shared)
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
