"""Runs stages one after the other, each from the weights of the one before: `baichuan-omni train` for each.

    baichuan-omni stages --workdir runs/recipe --tiny
    baichuan-omni stages --workdir runs/recipe configs/omni_64k.py configs/sft.py -- --multihost

Without files, the six stages of the recipe (`--tiny`: on the tiny model). A stage's workdir is WORKDIR/NAME of its
configuration; the first starts from its own `checkpoint.init_from`. Started again, finished stages are passed over.
What follows `--` goes to every `train`. Exit code: that of the first stage that did not finish.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from etils import epath

from baichuan_omni_jax.checkpoint.steps import committed_steps
from baichuan_omni_jax.cli.common import add_set_argument
from baichuan_omni_jax.config import STAGES, RunConfig, apply_overrides, load_run_config
from baichuan_omni_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="*", metavar="CONFIG", help="the stages' files; what follows -- goes to every `train`")
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of the stages' workdirs")
    add("--tiny", action="store_true", help="the recipe's stages on the tiny model")
    add_set_argument(parser, "override of one key in every stage, as data.root=DIR; may be repeated")


def run(options: argparse.Namespace) -> int:
    """Every stage in order. Raises ConfigError for a configuration that cannot be read, before any stage starts."""
    files, passed_on = split_files(options.files)
    stages = [(file, apply_overrides(load_run_config(file), options.set)) for file in files or recipe(options.tiny)]
    names = [run.name for _, run in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"two stages of the chain have one name: {', '.join(names)}")
    parent = None
    for number, (file, run) in enumerate(stages, 1):
        workdir = options.workdir / run.name
        print(f"stage {number} of {len(stages)}: {run.name}" + (f", from {parent}" if parent else ""), flush=True)
        changes = [*options.set, *([f"checkpoint.init_from={parent}"] if parent else [])]
        if code := train_stage(file, workdir, changes, passed_on):
            return code
        if not is_finished(workdir, run):
            print(f"stage {run.name} was stopped before its end: the same command goes on", flush=True)
            return 0
        parent = workdir
    return 0


def train_stage(file: Path, workdir: Path, changes: list[str], passed_on: list[str]) -> int:
    """Trains one stage in a process of its own, which SIGTERM reaches; returns its exit code."""
    command = [sys.executable, "-m", "baichuan_omni_jax", "train", "--config", str(file)]
    command += ["--workdir", str(workdir), *passed_on]
    command += [part for change in changes for part in ("--set", change)]
    with subprocess.Popen(command) as stage:
        signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
        return stage.wait()


def is_finished(workdir: Path, run: RunConfig) -> bool:
    """Whether the workdir holds a checkpoint of the run's last step."""
    return max(committed_steps(epath.Path(workdir)), default=0) >= run.train.steps


def recipe(tiny: bool) -> list[Path]:
    """The files of the recipe's six stages."""
    return [ROOT / "configs" / f"{stage}{'_tiny' if tiny else ''}.py" for stage in STAGES]


def split_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Configuration files, and from the first flag on what stood behind `--`."""
    first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return [Path(argument) for argument in arguments[:first]], arguments[first:]
