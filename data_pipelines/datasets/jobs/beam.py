"""Units of a job on Apache Beam: on its local runner, or on Dataflow, Flink or Spark through Beam's own options.

A worker writes a unit's files into the job's folder as a local process would, so that folder, and the media that the
units name, must have the same path on every worker: a network file system. What comes back goes through it as well.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import write_json
from data_pipelines.datasets.jobs.job import Job, Outcomes, Unit
from data_pipelines.datasets.jobs.local import LocalRunner

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise ConfigError("--runner beam needs Apache Beam: pip install 'baichuan_omni_jax[beam]'") from error


class BeamRunner:
    """Runs all units as one Beam pipeline and waits for its end.

    Without `--runner` among `arguments` (Beam's pipeline options) the units go to `workers` processes of this machine
    (0: to one thread of this process).
    """

    def __init__(self, workers: int, arguments: Sequence[str] = ()):
        self.arguments = list(arguments)
        if not any(argument.startswith("--runner") for argument in arguments):
            self.arguments += _local_arguments(workers)

    def __call__(self, job: Job, units: Sequence[Unit]) -> Outcomes:
        """Yields when the pipeline has ended. Raises ConfigError, with Beam's message, when it ended badly."""
        if not units:
            return
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


def _local_arguments(workers: int) -> list[str]:
    mode = "multi_processing" if workers else "in_memory"
    return ["--runner=FnApiRunner", f"--direct_num_workers={max(workers, 1)}", f"--direct_running_mode={mode}"]


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
