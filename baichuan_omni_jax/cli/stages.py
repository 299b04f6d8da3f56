"""Chains of training runs: each a process of its own, from the weights of those before; finished ones are passed over.

`baichuan-omni stages` runs configurations one after the other, `baichuan-omni recipe` a table of them
(`config/recipes.py`) with data, evaluation and a report around it.
"""

import argparse
import ctypes
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from etils import epath

from baichuan_omni_jax.checkpoint.steps import committed_steps
from baichuan_omni_jax.cli.chain_folder import ChainFolder, chain_folder
from baichuan_omni_jax.cli.common import add_set_argument
from baichuan_omni_jax.config import STAGES, RunConfig, load_run_config
from baichuan_omni_jax.config.recipes import RecipeStage
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.chain_record import ChainWriter
from baichuan_omni_jax.evaluation.retention import read_stage, write_retention
from baichuan_omni_jax.storage import parse_path

# A chain that SIGTERM ended before its last stage: the shell's code for it. A script takes 0 for the end of all stages.
STOPPED_CODE = 143
_TICK = 1.0  # seconds between looks at a process that is at work
_DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True, kw_only=True)
class ChainStage:
    """One run of a chain.

    Attributes:
        config: its file, or the name of its configuration.
        run: what that says, without where the first weights come from.
        workdir: where it is trained.
        changes: all that `train` is given by `--set`.
        step_seconds: what a step is expected to take.
    """

    config: str
    run: RunConfig
    workdir: epath.Path
    changes: tuple[str, ...]
    step_seconds: float = 1.0

    @property
    def is_finished(self) -> bool:
        """Whether its last step is saved."""
        return max(committed_steps(self.workdir), default=0) >= self.run.train.steps

    @property
    def command(self) -> list[str]:
        """What trains it."""
        command = [sys.executable, "-m", "baichuan_omni_jax", "train", "--config", self.config]
        return [*command, "--workdir", str(self.workdir), *(p for change in self.changes for p in ("--set", change))]


def plan_chain(
    stages: Sequence[RecipeStage],
    folder: epath.Path,
    changes: Sequence[str],
    own_changes: Callable[[RunConfig], Sequence[str]] = lambda run: (),
) -> list[ChainStage]:
    """Reads every configuration of a chain, before any stage starts.

    Args:
        stages: the table.
        folder: where the stages' workdirs lie.
        changes: `key=value` for every stage.
        own_changes: returns further ones for a stage.

    Returns:
        The stages, in order.

    Raises:
        ConfigError: names the configuration that cannot be used or has no step, two stages of one name, or a parent
            that is none of the stages before.
    """
    planned: list[ChainStage] = []
    for stage in stages:
        config = stage.config or stage.name
        run = load_run_config(config, changes)
        own = own_changes(run)
        run = load_run_config(config, [*changes, *own])
        # A stage without a step would pass for a finished one.
        if run.train.steps < 1:
            raise ConfigError(f"train.steps of {run.name} must be at least 1, not {run.train.steps}")
        if run.name in (known.run.name for known in planned):
            names = ", ".join(each.name for each in stages)
            raise ConfigError(f"two stages of the chain have one name: {names}")
        homes = {known.run.name: known.workdir for known in planned}
        parents = [f"{key}={fill_names(value, homes)}" for key, value in stage.parents.items()]
        planned.append(
            ChainStage(
                config=config,
                run=run,
                workdir=folder / run.name,
                changes=(*changes, *own, *parents),
                step_seconds=stage.step_seconds,
            )
        )
    return planned


def fill_names(template: str, homes: Mapping[str, epath.Path]) -> str:
    """Replaces each `{NAME}` by that stage's folder. Raises ConfigError for a name that there is not."""
    # The names alone: a folder may have braces in its own.
    names = re.findall(r"\{([^{}]*)\}", template)
    if [name for name in names if name not in homes]:
        known = ", ".join(homes) or "no stage"
        raise ConfigError(f"{template}: there is no such stage before this one, but {known}")
    # A spec of branches is cut at these, so that training would look for another folder.
    if odd := [str(homes[name]) for name in names if set(",=") & set(str(homes[name]))]:
        raise ConfigError(f"{odd[0]}: a workdir whose stages begin from others has no comma and no = in its name")
    return re.sub(r"\{([^{}]*)\}", lambda found: str(homes[found[1]]), template)


class ProcessRunner:
    """Runs the processes of a chain one at a time; SIGTERM reaches the one at work, and then no other is started.

    With a log a process has a session of its own: Ctrl-C reaches this process alone, which asks the other to save and
    leave. Used as a context, in the main thread.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ProcessRunner":
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *failure: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # A preempted machine signals this process; the stage saves, and its exit code is what it would be alone.
        self.stopped = True
        if self._process is not None:
            self._process.terminate()

    def run(
        self,
        command: Sequence[str],
        log: Path | None = None,
        tick: Callable[[], None] = lambda: None,
        on_interrupt: Callable[[], None] = lambda: None,
    ) -> int:
        """Runs a command to its end.

        Args:
            command: the program and its arguments.
            log: the file that its output is added to; None: the terminal.
            tick: called about once a second.
            on_interrupt: called at Ctrl-C, before the wait for the process to leave.

        Returns:
            Its exit code; negative: the signal that killed it.
        """
        if log is None:
            process = subprocess.Popen(command)
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        with process:
            self._process = process
            try:
                # The signal may have come while the process was being made.
                if self.stopped:
                    process.terminate()
                return _wait(process, tick)
            except BaseException as error:
                # At a terminal Ctrl-C reaches it too. Whatever else ends the chain, as a full disk, lets it save.
                if log is not None or not isinstance(error, KeyboardInterrupt):
                    process.terminate()
                try:
                    if isinstance(error, KeyboardInterrupt):
                        on_interrupt()
                    process.wait()
                # Once more: without what was not saved.
                except KeyboardInterrupt:
                    process.kill()
                raise
            finally:
                self._process = None


def _wait(process: subprocess.Popen, tick: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(_TICK)
        except subprocess.TimeoutExpired:
            tick()


def _die_with_parent() -> None:
    """Lets the process be asked to save and leave when the chain's own process is killed; where Linux can do that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def add_stages_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `stages`."""
    add = parser.add_argument
    add("files", nargs="*", metavar="CONFIG", help="the stages' files; what follows -- goes to every `train`")
    add(
        "--workdir", required=True, metavar="DIR", help="folder of the stages' workdirs; may be a URL: gs://BUCKET/RUNS"
    )
    add("--tiny", action="store_true", help="the recipe's stages on the tiny model")
    add_set_argument(parser, "override of one key in every stage, as data.root=DIR; may be repeated")


def run_stages(options: argparse.Namespace) -> int:
    """Trains stages one after the other, each from the weights of the one before: `baichuan-omni train` for each.

        baichuan-omni stages --workdir runs/recipe --tiny
        baichuan-omni stages --workdir runs/recipe configs/omni_64k.py configs/sft.py -- --multihost

    Without files, the six stages of the recipe (`--tiny`: on the tiny model). A stage's workdir is WORKDIR/NAME of its
    configuration; the first starts from its own `checkpoint.init_from`. Started again, finished stages are passed over.
    What follows `--` goes to every `train`. At the end WORKDIR/retention.md, and the terminal, have the held-out
    abilities after every stage that measured any (`eval.abilities`). Exit code: that of the first stage that did not
    finish; 143 after SIGTERM.
    """
    files, passed_on = split_files(options.files)
    rows: list[RecipeStage] = []
    for file in files or released_stages(options.tiny):
        # A stage begins from the workdir before it, which is finished: its newest step is its last.
        parents = {"checkpoint.init_from": f"{{{rows[-1].name}}}"} if rows else {}
        rows.append(RecipeStage(name=load_run_config(file, options.set).name, config=str(file), parents=parents))
    location = parse_path(options.workdir)
    chain = plan_chain(rows, location, options.set)
    with chain_folder(location) as folder:
        return _run_chain(folder, chain, passed_on)


def _run_chain(folder: ChainFolder, chain: Sequence[ChainStage], passed_on: Sequence[str]) -> int:
    record = ChainWriter(folder.path, {stage.run.name: stage.run.train.steps for stage in chain})
    with ProcessRunner() as processes:
        for number, stage in enumerate(chain, 1):
            parent = chain[number - 2].workdir if number > 1 else None
            name = stage.run.name
            print(f"stage {number} of {len(chain)}: {name}" + (f", from {parent}" if parent else ""), flush=True)
            with record.timed(name):
                code = processes.run([*stage.command, *passed_on])
            if code:
                return code
            if not stage.is_finished:
                print(f"stage {name} was stopped before its end: the same command goes on", flush=True)
                return STOPPED_CODE
            if processes.stopped:
                print(f"stopped after stage {name}: the same command goes on", flush=True)
                return STOPPED_CODE
    if table := write_abilities(folder, chain):
        print(table, flush=True)
    return 0


def write_abilities(folder: ChainFolder, chain: Sequence[ChainStage]) -> str:
    """Writes the table of abilities after each stage into the chain's folder; returns it, "" without any."""
    folder.refresh()
    measured = [found for stage in chain if (found := read_stage(stage.run.name, folder.path / stage.run.name))]
    return write_retention(folder.path, measured) if measured else ""


def released_stages(tiny: bool) -> list[str]:
    """The recipe's six stages by name: an installed wheel has no `configs/` beside it."""
    return [f"{stage}{'_tiny' if tiny else ''}" for stage in STAGES]


def split_files(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Configuration files, and what stood behind `--`: the first flag and all after it."""
    first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return [Path(argument) for argument in arguments[:first]], list(arguments[first:])
