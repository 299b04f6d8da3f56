"""Units of a job in processes of this machine (`LocalRunner`), or on Apache Beam (`BeamRunner`).

Beam runs them on its local runner, or on Dataflow, Flink or Spark through its own options. A worker writes a unit's
files into the job's folder as a local process would, so that folder, and the media that the units name, must have the
same path on every worker: a network file system. What comes back goes through it as well.
"""

import importlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import write_json
from data_pipelines.datasets.jobs.job import Job, Outcomes, Unit, describe_error

# Spawned: forking a process that runs threads (JAX, Grain) may deadlock.
_SPAWN = multiprocessing.get_context("spawn")


class HeldPool(ProcessPoolExecutor):
    """Processes that end with the one that started them, whatever ends it, and leave Ctrl-C to it."""

    def __init__(self, workers: int, initializer: Callable[..., None] | None = None, initargs: tuple = ()):
        # A pipe that nobody writes to: its end tells the workers that this process is gone.
        self._held, self._holder = _SPAWN.Pipe(duplex=False)
        super().__init__(workers, _SPAWN, _hold_on, (self._held, initializer, initargs))

    def let_go(self) -> None:
        """Ends all of them at once, with what is under way."""
        self._holder.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._holder.close()
        self._held.close()


class LocalRunner:
    """Runs units in `workers` processes (0: in this one).

    When a process dies (out of memory, a crash inside a decoder) the others go on in new ones. The few units that were
    under way are tried again together, and those that were under way when a process died again, one at a time: only
    one that kills its process alone has failed. Processes end with this one, whatever ends it.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def __call__(self, job: Job, units: Sequence[Unit]) -> Outcomes:
        job = replace(job, units=())  # every unit that is sent takes the job along
        # In this process: for tests, and where a pool would take longer to start than the work does.
        if not self.workers:
            yield from ((unit, _attempt(job, unit)) for unit in units)
            return
        # A pool that broke does not say which of the units under way killed its process. Two rounds over them clear the
        # innocent; what is still suspect then runs alone, where the answer is certain.
        once = yield from self._rounds(job, units)
        twice = yield from self._rounds(job, once)
        for unit in twice:
            if (yield from _run_pool(job, deque([unit]), 1)):
                yield unit, RuntimeError("the process doing it died three times, at last alone: a crash or no memory")

    def _rounds(self, job: Job, units: Iterable[Unit]) -> Generator[tuple[Unit, dict | Exception], None, list[Unit]]:
        """Pools, one after the other, until each unit was done or under way when a pool broke; returns the latter."""
        pending, lost = deque(units), []
        while pending:
            lost += yield from _run_pool(job, pending, min(self.workers, len(pending)))
        return lost


def _run_pool(
    job: Job, pending: deque[Unit], workers: int
) -> Generator[tuple[Unit, dict | Exception], None, list[Unit]]:
    """Takes units from `pending` and yields what was done, until none is left or a process dies.

    Returns the units that were under way then.
    """
    pool = HeldPool(workers)
    futures: dict[Future, Unit] = {}
    broken = False
    try:
        while (pending or futures) and not broken:
            # One more than there are workers, so that none waits for us; not all, of which there may be millions.
            while pending and len(futures) <= workers:
                futures[pool.submit(_attempt, job, pending[0])] = pending[0]
                pending.popleft()
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken = True
                else:
                    yield futures.pop(future), error if isinstance(error, Exception) else future.result()
    except BrokenProcessPool:  # of `submit`: the unit is pending still
        pass
    except BaseException:  # Ctrl-C, or the caller has stopped: nobody waits for what is under way
        pool.let_go()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return list(futures.values())


def _attempt(job: Job, unit: Unit) -> dict | Exception:
    try:
        return job.run_unit(unit)
    except StorageError as error:
        return error
    except Exception as error:
        return RuntimeError(describe_error(error))  # not every exception survives the way to another process


def _hold_on(held: Connection, initializer: Callable[..., None] | None, initargs: tuple) -> None:
    """In a worker: ends it when the process that started it closes the other end of the pipe, or is no more."""
    # Ctrl-C goes to all processes of a terminal, and the main one decides what it means: a worker that died of it would
    # look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with suppress(EOFError, OSError):
            held.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if initializer:
        initializer(*initargs)


class BeamRunner:
    """Runs all units as one Beam pipeline and waits for its end.

    Without `--runner` among `arguments` (Beam's pipeline options) the units go to `workers` processes of this machine
    (0: to one thread of this process).
    """

    def __init__(self, workers: int, arguments: Sequence[str] = ()):
        # Beam takes seconds to import, and is an extra: refused before anything else is done.
        try:
            importlib.import_module("apache_beam")
        except ImportError as error:
            raise ConfigError("--runner beam needs Apache Beam: pip install 'baichuan_omni_jax[beam]'") from error
        self.arguments = list(arguments)
        if not any(argument.startswith("--runner") for argument in arguments):
            mode = f"--direct_running_mode={'multi_processing' if workers else 'in_memory'}"
            self.arguments += ["--runner=FnApiRunner", f"--direct_num_workers={max(workers, 1)}", mode]

    def __call__(self, job: Job, units: Sequence[Unit]) -> Outcomes:
        """Yields when the pipeline has ended. Raises ConfigError, with Beam's message, when it ended badly."""
        if not units:
            return
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        # One pipeline for all units: its end is the only moment at which Beam tells anything reliably.
        try:
            with beam.Pipeline(options=PipelineOptions(self.arguments)) as pipeline:
                # Reshuffled: otherwise one worker would do all that one Create emits.
                _ = pipeline | beam.Create(units) | beam.Reshuffle() | beam.Map(_do, replace(job, units=()))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # after the workers' tracebacks
            raise ConfigError(f"{job.title}: Apache Beam failed: {reason}") from error
        # What became of each unit is read from the shared folder, not from the pipeline.
        for unit in units:
            yield unit, _outcome(job, unit)


def _do(unit: Unit, job: Job) -> None:
    """In a process of its own: one that died would stop Beam's local runner for ever, and others' after some attempts.

    An exception would end the whole pipeline: it is left in a file instead.
    """
    failure = _failure(job, unit)
    failure.unlink(missing_ok=True)
    for _, outcome in LocalRunner(1)(job, [unit]):
        if isinstance(outcome, Exception):
            write_json(failure, {"error": str(outcome)})


def _outcome(job: Job, unit: Unit) -> dict | Exception:
    """Returns what a worker left of a unit: its summary, or the error that it met."""
    try:
        message = json.loads(_failure(job, unit).read_text(encoding="utf-8"))["error"]
        _failure(job, unit).unlink()
        return RuntimeError(message)
    except FileNotFoundError:
        summary = job.summary(unit)
        if summary is None:
            return RuntimeError(f"its files did not arrive in {job.out}, which all workers must share")
        return summary


def _failure(job: Job, unit: Unit) -> Path:
    return job.out / ".units" / f"{unit.name}.failed.json"
