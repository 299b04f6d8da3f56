"""Units of a job in processes of this machine."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from data_pipelines.jobs.job import Job, Unit

ATTEMPTS = 2  # at a unit whose process dies: a decoder may crash on one file


class LocalRunner:
    """Runs units in `workers` processes (0: in this one).

    When a process dies (out of memory, a crash inside a decoder) the units that were under way are tried again one at
    a time, so that only the one that kills its process fails.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def __call__(self, job: Job, units: Sequence[Unit]) -> Iterator[tuple[Unit, dict | Exception]]:
        if not self.workers:
            yield from ((unit, _attempt(job, unit)) for unit in units)
            return
        broken = yield from _run_pool(job, units, self.workers)
        for unit in broken:
            for attempt in range(ATTEMPTS):
                if not (yield from _run_pool(job, [unit], 1)):
                    break
                if attempt + 1 == ATTEMPTS:
                    yield unit, RuntimeError("its process died")


def _run_pool(job: Job, units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, dict | Exception]]:
    """Yields what was done; returns the units that a dying process left undone."""
    broken = []
    # Spawned: forking a process that runs threads (JAX, Grain) may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: dict[Future, Unit] = {}
        for unit in units:
            try:
                futures[pool.submit(_attempt, job, unit)] = unit
            except BrokenProcessPool:
                broken.append(unit)
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                broken.append(futures[future])
    return broken


def _attempt(job: Job, unit: Unit) -> dict | Exception:
    try:
        return job.do(unit)
    except Exception as error:
        return error
