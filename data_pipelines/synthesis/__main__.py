"""`python -m data_pipelines.synthesis JOB MANIFEST... --out DIR`: makes new documents from those of manifests.

`voices` in place of a job lists the voices that speak. A job that was stopped goes on where it was when the same
command is given again.
"""

import argparse
import shutil
import sys

from baichuan_omni_jax.errors import ConfigError, exit_code
from data_pipelines.datasets.builder.build import UNPACKED
from data_pipelines.datasets.jobs import run_job
from data_pipelines.datasets.jobs.job import hold, refuse_foreign
from data_pipelines.datasets.jobs.runners import add_runner_arguments, chosen_runner
from data_pipelines.errors import describe_causes, first_of_causes
from data_pipelines.synthesis.captions import job as captions
from data_pipelines.synthesis.filters import job as filters
from data_pipelines.synthesis.pages import job as pages
from data_pipelines.synthesis.speech import asr, crossmodal, dialogue, intlv, itts, tts, voice_list
from data_pipelines.synthesis.units import add_job_arguments, assemble
from data_pipelines.tools.commands import run_job_command, skipped_lines

LOCK = "synthesis"
JOBS = (intlv, itts, asr, tts, dialogue, crossmodal, pages, captions, filters)  # modules, one a job


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    if not options.job:
        return exit_code(lambda: voice_list.list_voices(options))
    return run_job_command(lambda: _run(options), options.out)


def _run(options: argparse.Namespace) -> None:
    refuse_foreign(options.out, LOCK)
    job, runner = options.job.make_job(options), chosen_runner(options)
    finish = getattr(options.job, "finish", assemble)
    with hold(options.out, LOCK, job.title):
        sums = finish(job, run_job(job, runner))
    for part, count in sorted(sums["made"].items()):
        print(f"{options.out / part}.jsonl: {count} documents")
    for key, name in (("rejected", "rejected"), ("skipped", f"skipped-{job.title}")):
        if counts := sums.get(key):
            path = options.out / f"{name}.jsonl"
            print(f"{path}: {counts.total()} {key}:")
            examples = first_of_causes(skipped_lines(path), counts) if key == "skipped" else {}
            for line in describe_causes(counts, examples):
                print(f"  {line}")
    shutil.rmtree(options.out / UNPACKED, ignore_errors=True)
    if not (sums["made"] or sums.get("rejected")):
        raise ConfigError(f"nothing can be made of {', '.join(map(str, options.manifests))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.synthesis", description=__doc__)
    jobs = parser.add_subparsers(metavar="JOB", required=True)
    for module in JOBS:
        own = jobs.add_parser(module.NAME, help=module.__doc__.splitlines()[0], description=module.__doc__)
        add_job_arguments(own)
        add_runner_arguments(own)
        module.add_arguments(own)
        own.set_defaults(job=module)
    voices = jobs.add_parser("voices", help="Lists the voices, and draws ten of them.", description=voice_list.__doc__)
    voice_list.add_arguments(voices)
    voices.set_defaults(job=None)
    return parser


if __name__ == "__main__":
    sys.exit(main())
