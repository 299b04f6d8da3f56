"""Makes new documents from those of manifests: speech, pages, charts, captions; and filters them.

`voices` in place of a job lists the voices that speak. A job that was stopped goes on where it was when the same
command is given again.
"""

import argparse
import shutil

from baichuan_omni_jax.errors import ConfigError, exit_code
from data_pipelines.datasets.builder.build import UNPACKED
from data_pipelines.datasets.jobs import run_job
from data_pipelines.datasets.jobs.job import hold, refuse_foreign
from data_pipelines.errors import describe_causes, first_of_causes
from data_pipelines.synthesis.captions import CAPTIONS
from data_pipelines.synthesis.filters.job import FILTERS
from data_pipelines.synthesis.pages.job import PAGES
from data_pipelines.synthesis.speech import voice_list
from data_pipelines.synthesis.speech.crossmodal import CROSSMODAL
from data_pipelines.synthesis.speech.tasks import ASR, DIALOGUE, INTLV, ITTS, TTS
from data_pipelines.synthesis.units import SynthesisTask, add_job_arguments
from data_pipelines.tools.commands import (
    add_runner_arguments,
    run_command,
    run_job_command,
    runner_from_options,
    skipped_lines,
)

LOCK = "synthesis"
TASKS = (INTLV, ITTS, ASR, TTS, DIALOGUE, CROSSMODAL, PAGES, CAPTIONS, FILTERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each task, and `voices`."""
    jobs = parser.add_subparsers(metavar="JOB", required=True)
    for task in TASKS:
        own = jobs.add_parser(task.name, help=task.description, description=task.description)
        add_job_arguments(own)
        add_runner_arguments(own)
        task.add_arguments(own)
        own.set_defaults(task=task)
    voices = jobs.add_parser("voices", help="Lists the voices, and draws ten of them.", description=voice_list.__doc__)
    voice_list.add_arguments(voices)
    voices.set_defaults(task=None)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    if arguments.task is None:
        return exit_code(lambda: voice_list.list_voices(arguments))
    return run_job_command(lambda: _synthesize(arguments, arguments.task), arguments.out)


def _synthesize(options: argparse.Namespace, task: SynthesisTask) -> None:
    """Runs one task's job, puts the manifests together and prints what was made and what was not."""
    refuse_foreign(options.out, LOCK)
    job, runner = task.make_job(options), runner_from_options(options)
    with hold(options.out, LOCK, job.title):
        sums = task.finish(job, run_job(job, runner))
    for part, count in sorted(sums["made"].items()):
        print(f"{options.out / part}.jsonl: {count} documents")
    for key, name in (("rejected", "rejected"), ("skipped", f"skipped-{job.title}")):
        if counts := sums.get(key):
            path = options.out / f"{name}.jsonl"
            print(f"{path}: {counts.total()} {key}:")
            examples = first_of_causes(skipped_lines(path), counts) if key == "skipped" else {}
            for line in describe_causes(counts, examples):
                print(f"  {line}")
    # What compressed manifests hold was only needed while the units read it.
    shutil.rmtree(options.out / UNPACKED, ignore_errors=True)
    if not (sums["made"] or sums.get("rejected")):
        raise ConfigError(f"nothing can be made of {', '.join(map(str, options.manifests))}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("synthesize", __doc__, add_arguments, run, arguments)
