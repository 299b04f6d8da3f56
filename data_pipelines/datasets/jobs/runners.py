"""Choosing what runs a job: processes of this machine, or Apache Beam."""

import argparse
import os
import shlex
from collections.abc import Sequence

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Runner
from data_pipelines.datasets.jobs.local import LocalRunner

RUNNERS = ("local", "beam")


def make_runner(name: str, workers: int, beam_arguments: Sequence[str] = ()) -> Runner:
    """The runner called `name`, with `workers` processes (0: in this one); `beam_arguments` are Beam's own options.

    Raises ConfigError for an unknown name, for fewer than 0 workers, and when Apache Beam is asked for and missing.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers} must be at least 0")
    if name == "local":
        if beam_arguments:
            raise ConfigError("--beam-args need --runner beam")
        return LocalRunner(workers)
    if name == "beam":
        from data_pipelines.datasets.jobs.beam import BeamRunner  # Beam takes seconds to import, and is an extra

        return BeamRunner(workers, beam_arguments)
    raise ConfigError(f"unknown runner {name!r}: {' or '.join(RUNNERS)}")


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--runner`, `--workers` and `--beam-args`; `chosen_runner` makes a runner of what was given."""
    add = parser.add_argument
    add("--runner", choices=RUNNERS, default="local", help="processes of this machine (default) or Apache Beam")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}, one for each core)")
    add("--beam-args", default="", metavar="OPTIONS", help="Beam's own, as in --beam-args='--runner=FlinkRunner'")


def chosen_runner(options: argparse.Namespace) -> Runner:
    """The runner that parsed arguments ask for. Raises ConfigError as `make_runner`."""
    return make_runner(options.runner, options.workers, shlex.split(options.beam_args))
