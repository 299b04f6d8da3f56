"""Runs stages one after the other, each from the weights of the one before: `launch/tpu_pretrain.py` for each.

    python launch/run_stages.py --workdir runs/recipe --tiny
    python launch/run_stages.py --workdir runs/recipe configs/omni_64k.py configs/sft.py -- --multihost

Without files, the six stages of the recipe (`--tiny`: on the tiny model). A stage's workdir is WORKDIR/NAME of its
configuration; the first starts from its own `checkpoint.init_from`. Started again, finished stages are passed over.
What follows `--` goes to every `tpu_pretrain.py`. Exit code: that of the first stage that did not finish.
"""

import signal
import subprocess
import sys
from pathlib import Path

from absl import flags
from etils import epath

from baichuan_omni_jax.checkpoint.steps import committed_steps
from baichuan_omni_jax.config import STAGES, RunConfig, apply_overrides, load_run_config
from baichuan_omni_jax.errors import ConfigError, exit_code, run_command

ROOT = Path(__file__).resolve().parents[1]
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the stages' workdirs", required=True)
TINY = flags.DEFINE_bool("tiny", False, "the recipe's stages on the tiny model")
SET = flags.DEFINE_multi_string("set", [], "override of one key in every stage, as in data.root=DIR; may be repeated")


def main(arguments: list[str]) -> None:
    files, passed_on = _split(arguments[1:])
    sys.exit(exit_code(lambda: run_chain(files or _recipe(), passed_on)))


def run_chain(files: list[Path], passed_on: list[str]) -> None:
    """Every stage in order. Raises ConfigError for a configuration that cannot be read, before any stage starts."""
    stages = [(file, apply_overrides(load_run_config(file), SET.value)) for file in files]
    names = [run.name for _, run in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"two stages of the chain have one name: {', '.join(names)}")
    parent = None
    for number, (file, run) in enumerate(stages, 1):
        workdir = Path(WORKDIR.value) / run.name
        print(f"stage {number} of {len(stages)}: {run.name}" + (f", from {parent}" if parent else ""), flush=True)
        code = _run(file, workdir, parent, passed_on)
        if code:
            sys.exit(code)
        if not _finished(workdir, run):
            print(f"stage {run.name} was stopped before its end: the same command goes on", flush=True)
            return
        parent = workdir


def _run(file: Path, workdir: Path, parent: Path | None, passed_on: list[str]) -> int:
    """One stage in a process of its own, which SIGTERM reaches."""
    command = [sys.executable, str(ROOT / "launch" / "tpu_pretrain.py"), "--config", str(file)]
    command += ["--workdir", str(workdir), *passed_on]
    for change in [*SET.value, *([f"checkpoint.init_from={parent}"] if parent else [])]:
        command += ["--set", change]
    with subprocess.Popen(command) as stage:
        signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
        return stage.wait()


def _finished(workdir: Path, run: RunConfig) -> bool:
    return max(committed_steps(epath.Path(workdir)), default=0) >= run.train.steps


def _recipe() -> list[Path]:
    return [ROOT / "configs" / f"{stage}{'_tiny' if TINY.value else ''}.py" for stage in STAGES]


def _split(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Configuration files, and what begins with the first flag that is not ours."""
    first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return [Path(argument) for argument in arguments[:first]], arguments[first:]


if __name__ == "__main__":
    run_command(main, files=True)
