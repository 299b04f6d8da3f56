"""The training loop: rows in, steps, numbers out, checkpoints; resumes by itself, leaves cleanly on SIGTERM."""

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from baichuan_omni_jax.checkpoint import Parent, Workdir
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.omni.batch import BATCH_AXES
from baichuan_omni_jax.omni.model import branches_of
from baichuan_omni_jax.sharding import ShardingRules, check_divisible, make_mesh
from baichuan_omni_jax.train.metrics import CompileCounter, MetricsWriter
from baichuan_omni_jax.train.report import ProgressLine, print_start_table
from baichuan_omni_jax.train.state import (
    Setup,
    TrainState,
    abstract_opt_state,
    advance,
    from_branches,
    init_state,
    make_compute,
    make_setup,
)
from baichuan_omni_jax.train.step import make_step

log = logging.getLogger(__name__)

NO_PARENT = Parent()
DocumentKey = tuple[int, int]  # source, number in it


@runtime_checkable
class Step(Protocol):
    """What the loop asks of a step of data (data_pipelines.rows.Step is one)."""

    batch: dict[str, np.ndarray]
    lost: dict[DocumentKey, tuple[str, str, str]]
    state: dict


@runtime_checkable
class Data(Protocol):
    """What the loop asks of a data set: counts for the report, and steps from a state on."""

    documents: int
    skipped: Counter
    tokenizer_json: str

    def steps(self, state: dict | None) -> Iterator[Step]: ...

    def check_lost(self, causes: Counter) -> None:
        """Raises ConfigError when too many documents turned out unusable."""


def set_up(run: RunConfig, omni: OmniConfig) -> tuple[Setup, Compute]:
    """Checks that mesh, budgets, groups and model fit, on shapes alone: before anything is read or written.

    Raises ConfigError naming what does not fit.
    """
    mesh, compute = make_mesh(run.mesh), make_compute(run)
    with jax.set_mesh(mesh):
        check_batch(run, mesh, compute.rules)
        return make_setup(run, omni, mesh, compute), compute


def train(
    run: RunConfig,
    omni: OmniConfig,
    workdir: Workdir,
    data: Data,
    parent: Parent = NO_PARENT,
    console: Console | None = None,
) -> TrainState:
    """Trains until `train.steps` or SIGTERM and returns the last state, which has been saved.

    `parent` is where the first weights came from: their branches' steps are counted on.

    Resumes from the workdir's newest good step. Raises ConfigError as `set_up`, and for a step that cannot be read.
    """
    console = console or Console()
    compiles = CompileCounter()
    setup, compute = set_up(run, omni)
    with jax.set_mesh(setup.mesh):
        state, data_state = _start(run, omni, setup, workdir, compute)
        if state.step:
            console.print(f"{workdir.path}: resumed from step {state.step}")
        print_start_table(console, run, setup, data.documents, data.skipped.total())
        if state.step >= run.train.steps:
            console.print(f"{workdir.path} is finished: step {state.step} of train.steps {run.train.steps}")
            return state
        return _Loop(run, omni, setup, workdir, data, parent, console, compiles, compute.rules).go(state, data_state)


def check_batch(run: RunConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises ConfigError naming the budget that the mesh does not divide."""
    budgets = run.data.budgets
    sizes = {"tokens": budgets.tokens, "patches": budgets.patches, "audio_codes": budgets.audio_frames}
    for field, size in (sizes | {"audio_targets": budgets.audio_targets}).items():
        check_divisible(mesh, rules, (run.data.rows, size), BATCH_AXES[field][:2], f"batch field {field}")


def _start(run, omni, setup: Setup, workdir: Workdir, compute) -> tuple[TrainState, dict | None]:
    if workdir.latest_step() is None:
        return init_state(run, omni, setup, compute), None
    found = workdir.restore(None, branches_of(setup.template), abstract_opt_state(setup))
    return from_branches(setup, found.branches, found.opt_state, found.step), found.data_state


class _Loop:
    """One run in progress. A step's numbers are read only after the next step has been sent to the device."""

    def __init__(self, run, omni, setup, workdir, data, parent, console, compiles, rules):
        self.run, self.omni, self.setup, self.workdir, self.data = run, omni, setup, workdir, data
        self.console, self.compiles, self.rules = console, compiles, rules
        self.step = make_step(setup, run)
        # Steps that the branches had been trained for when this run began.
        self.before = parent.trained
        self.lost: dict[DocumentKey, str] = {}
        self.stop = False
        self.last_end = 0.0

    def go(self, state: TrainState, data_state: dict | None) -> TrainState:
        leader = jax.process_index() == 0
        metrics = MetricsWriter(self.workdir.path, state.step) if leader else None
        line = ProgressLine(self.console, self.run.train.steps, state.step) if leader else None
        steps = self.data.steps(data_state)
        restore_signal = self._on_sigterm()
        pending, saved = None, state.step
        try:
            while state.step < self.run.train.steps and not self.stop:
                began = time.perf_counter()
                step = next(steps)
                waited = time.perf_counter() - began
                self._note_lost(step.lost)
                trainable, opt_state, numbers = self.step(
                    state.trainable, state.frozen, state.opt_state, self._place(step.batch)
                )
                state, data_state = advance(state, trainable, opt_state), step.state
                if pending is not None:
                    self._report(pending, metrics, line)
                pending = (state.step, numbers, waited, began)
                if state.step % self.run.checkpoint.every == 0:
                    # A saved step's numbers must be on disk: a run that resumes after it never computes them again.
                    self._report(pending, metrics, line)
                    self._save(state, data_state)
                    pending, saved = None, state.step
            if pending is not None:
                self._report(pending, metrics, line)
            if saved != state.step:
                self._save(state, data_state)
            self.workdir.wait()
        finally:
            steps.close()
            restore_signal()
            if leader:
                metrics.close()
                line.close()
        self._say_why_it_ended(state)
        return state

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows as its part of the global batch."""
        put = jax.make_array_from_process_local_data
        spec = self.rules.spec
        return {
            name: put(NamedSharding(self.setup.mesh, spec(*BATCH_AXES[name])), value) for name, value in batch.items()
        }

    def _report(self, pending: tuple, metrics: MetricsWriter | None, line: ProgressLine | None) -> None:
        step, numbers, waited, began = pending
        numbers = {name: float(value) for name, value in numbers.items()}
        now = time.perf_counter()
        numbers["tokens"] = int(numbers["tokens"])
        # From the start of this step (or the end of the one before, still running then) until its numbers were there.
        took = now - max(began, self.last_end)
        self.last_end = now
        row = {"step": step, **numbers, "step_time_s": took, "data_wait_s": waited, "compiles": self.compiles.count}
        row["skipped"] = dict(self.data.skipped + Counter(self.lost.values()))
        if metrics is not None:
            metrics.write(row)
            line.show(row)

    def _note_lost(self, lost: dict[DocumentKey, tuple[str, str, str]]) -> None:
        for key, (where, cause, message) in lost.items():
            if key not in self.lost:
                self.lost[key] = cause
                log.warning("skipped %s (%s): %s", where, cause, message)
        if lost:
            self.data.check_lost(Counter(self.lost.values()))

    def _save(self, state: TrainState, data_state: dict) -> None:
        branches = branches_of(self.setup.assemble(state.trainable, state.frozen))
        trained = dict(self.before)
        for name in {path.split(".")[0] for path in state.trainable}:
            trained[name] = trained.get(name, 0) + state.step
        self.workdir.save(
            state.step,
            branches,
            state.opt_state,
            data_state,
            self.omni,
            self.data.tokenizer_json,
            trained={name: trained.get(name, 0) for name in branches},
        )

    def _on_sigterm(self) -> Callable[[], Any]:
        """Asks the loop to stop after the step in progress; returns how to put the old handler back."""

        def ask(*_):
            self.stop = True

        try:
            old = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            return lambda: None
        return lambda: signal.signal(signal.SIGTERM, old)

    def _say_why_it_ended(self, state: TrainState) -> None:
        if self.stop:
            self.console.print(f"stopped by SIGTERM: step {state.step} is saved in {self.workdir.path}")
        else:
            self.console.print(f"finished at step {state.step}; saved in {self.workdir.path}")
