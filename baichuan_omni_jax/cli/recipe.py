"""Runs a recipe: data, all training runs, evaluation and a report page, from random weights to a model one can talk to.

    baichuan-omni recipe small --workdir runs/small
    baichuan-omni recipe report --workdir runs/small

Each run is a `baichuan-omni train` in WORKDIR/NAME, whose output goes to its log.txt; one view shows all of them, with
the time that is left. Killed at any moment, the same command goes on: finished runs are passed over, the others go on
inside. `report` draws WORKDIR/report.html at any time, also of a run that is at work and of a workdir of `stages`.
Exit code 2: something given cannot be used. 3: a run ended itself. 130, 143: Ctrl-C, SIGTERM,
with everything saved.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath
from rich.console import Console

from baichuan_omni_jax.checkpoint.run_folder import lock_file
from baichuan_omni_jax.cli.chain_folder import ChainFolder, chain_folder
from baichuan_omni_jax.cli.chain_progress import ChainView, StageProgress, duration
from baichuan_omni_jax.cli.common import add_set_argument
from baichuan_omni_jax.cli.stages import (
    STOPPED_CODE,
    ChainStage,
    ProcessRunner,
    fill_names,
    plan_chain,
    write_abilities,
)
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.recipes import RECIPES, Recipe
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.evaluation.chain_record import ABILITIES, EVALUATION, ChainWriter, read_chain
from baichuan_omni_jax.evaluation.report_page import REPORT, write_report
from baichuan_omni_jax.storage import is_url, parse_path, take_lock

LOG, DATA = "log.txt", "data"
# What is not training, in seconds on two CPU cores.
_EXPECTED = {DATA: 130.0, EVALUATION: 180.0}
_SAVES = 8  # checkpoints of a stage, at least: what a kill may cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipes, the report, and their flags."""
    tasks = parser.add_subparsers(dest="recipe", required=True, metavar=" | ".join([*RECIPES, "report"]))
    for name, recipe in RECIPES.items():
        what = f"trains {len(recipe.stages)} runs, evaluates the last one and writes the report"
        task = tasks.add_parser(name, help=what, description=what)
        add = task.add_argument
        add("--workdir", required=True, metavar="DIR", help="where all of it goes; may be a URL: gs://BUCKET/RUN")
        add("--data", type=Path, metavar="DIR", help=f"the data set, made where it is not there ({recipe.data})")
        add("--until", metavar="STAGE", help="the last stage to train; later, the command without it goes on")
        add("--share", type=_share, default=1.0, metavar="X", help="of every stage's steps, to try it (%(default)s)")
        add_set_argument(task, "override of one key in every stage; may be repeated")
    what = "draws WORKDIR/report.html from what is there by now"
    report = tasks.add_parser("report", help=what, description=what)
    about = "of a recipe, of stages, or of a run; may be a URL"
    report.add_argument("--workdir", required=True, metavar="DIR", help=about)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: above 0, at most 1")
    return share


def run(options: argparse.Namespace) -> int:
    """Runs the recipe, or draws the report; returns the exit code."""
    if options.recipe == "report":
        return _report(parse_path(options.workdir))
    return _Chain(options, RECIPES[options.recipe], Console()).run()


def _report(location: epath.Path) -> int:
    # Not `Path.is_dir`, which raises of a name that is too long.
    if not is_url(location) and not os.path.isdir(location):
        raise ConfigError(f"--workdir {location} is no folder")
    with chain_folder(location, "report") as folder:
        if not read_chain(folder.path).stages:
            raise ConfigError(f"--workdir {location} holds no run, nor a chain of them")
        write_report(folder.path, location.name)
    print(location / REPORT)
    return 0


@dataclass
class _Work:
    """One thing that the recipe does: a command with its log, and how it is shown."""

    progress: StageProgress
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    workdir: epath.Path | None = None  # of a run


class _Chain:
    """One start of a recipe."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe, console: Console) -> None:
        """Reads all configurations, and refuses what cannot be used before anything is made."""
        self._recipe, self._console, self._location = recipe, console, parse_path(options.workdir)
        self._data = options.data or Path(recipe.data)
        changes = [f"data.root={self._data}", *options.set]
        if recipe.tokenizer:
            changes.insert(0, f"data.tokenizer={self._data / recipe.tokenizer}")
        chain = plan_chain(
            recipe.stages, self._location, changes, lambda run: _own_changes(run, options.share, options.set)
        )
        self._homes = {stage.run.name: stage.workdir for stage in chain}
        self._whole = options.until is None
        self._chain = chain if self._whole else chain[: 1 + _find_stage(chain, options.until)]
        # Of all that the recipe ever does, also where this start ends earlier.
        asked = {EVALUATION: 1} if chain[-1].run.eval.abilities else {}
        stages = {stage.run.name: stage.run.train.steps for stage in chain}
        self._steps = ({DATA: 1} if recipe.build else {}) | stages | asked
        self._name = options.recipe

    def run(self) -> int:
        """Does what is left to do."""
        taken = f"another recipe is at work in {self._location}; nothing was changed"
        with chain_folder(self._location, taken=taken) as folder:
            return self._run_all(folder)

    def _run_all(self, folder: ChainFolder) -> int:
        self._path = folder.path
        began, works = time.monotonic(), self._works(folder)
        record = ChainWriter(folder.path, self._steps, self._name)
        todo = [work for work in works if work.progress.name != DATA and not work.is_done()]
        for work in works:
            work.progress.poll()
            # The data are looked after as long as anything reads them.
            if work not in todo and (work.progress.name != DATA or not todo):
                work.progress.state, work.progress.step = "done", work.progress.steps
        with ProcessRunner() as processes, ChainView([work.progress for work in works], self._console) as view:
            for work in works:
                if work.progress.state == "done":
                    continue
                if not self._do(work, processes, view, record):
                    return STOPPED_CODE
                write_abilities(folder, self._chain)
                write_report(folder.path, self._location.name)
        if not todo:
            write_report(folder.path, self._location.name)
        self._console.print(f"done in {duration(time.monotonic() - began)}: {self._location / REPORT}")
        if self._whole:
            self._say_how_to_talk()
        return 0

    def _works(self, folder: ChainFolder) -> list[_Work]:
        works = []
        if self._recipe.build:
            command = [sys.executable, "-m", self._recipe.build, str(self._data)]
            progress = StageProgress(DATA, 1, _EXPECTED[DATA])
            works.append(_Work(progress, command, folder.path / "data.log", lambda: True))
        for stage in self._chain:
            name, home = stage.run.name, folder.path / stage.run.name
            numbers = home if stage.is_finished else folder.home_at_work(name)
            progress = StageProgress(name, stage.run.train.steps, stage.step_seconds, numbers)
            done = lambda stage=stage: stage.is_finished  # noqa: E731
            works.append(_Work(progress, stage.command, home / LOG, done, stage.workdir))
        last = self._chain[-1]
        if self._whole and last.run.eval.abilities:
            out = folder.path / EVALUATION
            command = [sys.executable, "-m", "baichuan_omni_jax", "evaluate", "abilities", "--run", str(last.workdir)]
            command += ["--checkpoint", self._spec(), "--out", str(out)]
            progress = StageProgress(EVALUATION, 1, _EXPECTED[EVALUATION])
            # Its last file is of the step that the last stage has now.
            done = lambda: last.is_finished and _evaluated_step(out) == last.run.train.steps  # noqa: E731
            works.append(_Work(progress, command, out / LOG, done))
        return works

    def _spec(self) -> str:
        """The checkpoint to talk to, by branch."""
        return fill_names(self._recipe.chat, self._homes) if self._recipe.chat else str(self._chain[-1].workdir)

    def _do(self, work: _Work, processes: ProcessRunner, view: ChainView, record: ChainWriter) -> bool:
        """Does one thing. Returns whether the next one may begin: not where SIGTERM ended it early."""
        self._wait_for_other(work, view)
        name = work.progress.name
        seen = work.log.stat().st_size if work.log.exists() else 0
        view.begin(work.progress)

        def tick() -> None:
            view.update(work.progress)
            record.note()

        try:
            with record.timed(name):
                code = processes.run(
                    work.command, work.log, tick, lambda: view.note(f"stopping {name}, which saves first")
                )
        except KeyboardInterrupt:
            sentence = f"stopped in {name}, what it has learned is saved: the same command goes on"
            raise KeyboardInterrupt(sentence) from None
        # What was asked to stop before it could save, as while it was starting, has lost nothing.
        stopped = processes.stopped and code == -signal.SIGTERM
        if code and not stopped:
            raise _failure(name, code, work.log, seen, self._location / work.log.relative_to(self._path))
        if stopped or not work.is_done():
            view.note(f"{name} was stopped before its end: the same command goes on")
            return False
        view.finish(work.progress)
        if processes.stopped:
            view.note(f"stopped after {name}: the same command goes on")
        return not processes.stopped

    def _wait_for_other(self, work: _Work, view: ChainView) -> None:
        """Waits for a run of a recipe that was killed: asked to leave, it may still be saving."""
        if work.workdir is None or not (lock := lock_file(work.workdir)).exists():
            return
        try:
            take_lock(lock, f"{work.progress.name} waits for a run that still works there", note=False).release()
        except ConfigError as error:
            view.note(str(error))
            take_lock(lock, "", wait=True, note=False).release()

    def _say_how_to_talk(self) -> None:
        spec = shlex.quote(self._spec())
        for line in (
            "talk to it:",
            f"  baichuan-omni serve --checkpoint {spec}",
            f"  baichuan-omni generate chat --checkpoint {spec} --interactive",
        ):
            # As it is: a line that was broken to fit could not be copied.
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _own_changes(run: RunConfig, share: float, given: Sequence[str]) -> list[str]:
    """What a recipe changes of a stage: checkpoints often enough; its steps and the rate's, where a share is wanted."""
    steps = max(1, round(run.train.steps * share))
    changes = []
    if share < 1:
        # A rate that has risen must have a step left to fall in, however small the share is.
        decay = max(2, round(run.optimizer.decay_steps * share))
        warmup = min(max(1, round(run.optimizer.warmup_steps * share)), decay - 1)
        changes = [f"train.steps={steps}", f"optimizer.decay_steps={decay}", f"optimizer.warmup_steps={warmup}"]
    if not any(change.startswith("checkpoint.every=") for change in given):
        changes.append(f"checkpoint.every={min(run.checkpoint.every, math.ceil(steps / _SAVES))}")
    return changes


def _evaluated_step(folder: Path) -> int | None:
    """The step of the evaluation that a folder holds; None without one."""
    try:
        return max(map(int, json.loads((folder / ABILITIES).read_text(encoding="utf-8"))["steps"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _find_stage(chain: Sequence[ChainStage], wanted: str) -> int:
    names = [stage.run.name for stage in chain]
    # `image_text_1` is short for `image_text_1_small`.
    found = [n for n, name in enumerate(names) if name == wanted or name.rpartition("_")[0] == wanted]
    if not found:
        raise ConfigError(f"--until {wanted}: there is no such stage, but {', '.join(names)}")
    return found[0]


def _failure(name: str, code: int, log: Path, seen: int, shown: epath.Path) -> Exception:
    """Says how a process ended, by its own last sentence: that stands in its log, behind the first `seen` bytes.

    `shown` is where the log will be.
    """
    if code < 0:
        why = f"{name} was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            why += " (by the system, where memory ran out)"
        return RunStoppedError(f"{why}; the same command goes on, {shown} has its output")
    with open(log, "rb") as file:
        file.seek(seen)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    sentence = lines[-1].strip().removeprefix("error: ") if lines else f"exit code {code}"
    error = ConfigError if code == 2 else RunStoppedError
    return error(f"{name}: {sentence} ({shown} has all of its output; the same command goes on)")
