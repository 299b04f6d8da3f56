"""The training loop: rows in, steps, numbers out, evaluation, checkpoints; resumes by itself, leaves on SIGTERM."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from rich.console import Console

from baichuan_omni_jax.checkpoint import Parent, Workdir
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import RunStoppedError
from baichuan_omni_jax.evaluation.held_out import Evaluation
from baichuan_omni_jax.flops.chips import peak_flops
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.audio_samples import Listening, check_samples
from baichuan_omni_jax.train.hosts import all_gather_str, is_process_zero, on_all_hosts, warm_up_collectives
from baichuan_omni_jax.train.input import BatchPlacer, DataStep, DocumentKey, FailedDocuments, TrainingData
from baichuan_omni_jax.train.metrics import CompileCounter, Row, Throughput, drop_absent_sources
from baichuan_omni_jax.train.nonfinite import NonfiniteGuard
from baichuan_omni_jax.train.output import Output
from baichuan_omni_jax.train.profiling import StepTrace
from baichuan_omni_jax.train.report import print_start_table
from baichuan_omni_jax.train.state import (
    StepSpec,
    TrainState,
    abstract_opt_state,
    advance,
    branches_of,
    from_checkpoint,
    init_state,
    make_compute,
    make_step_spec,
    to_checkpoint,
)
from baichuan_omni_jax.train.step import make_step
from baichuan_omni_jax.train.stopping import StopSignal

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a start may add to a run without changing what it computes.

    `parent` is where the first weights came from: their branches' steps are counted on. `held_out` has the data of
    `eval.mixtures` by name. `profile` are the steps to trace; `wandb` is a project there.
    """

    parent: Parent = Parent()
    held_out: Mapping[str, TrainingData] = field(default_factory=dict)
    profile: range | None = None
    wandb: str = ""


NOTHING = RunOptions()


def set_up(run: RunConfig, omni: OmniConfig) -> tuple[StepSpec, ComputePolicy]:
    """Checks that mesh, budgets, groups and model fit, on shapes alone: before anything is read or written.

    Raises ConfigError naming what does not fit.
    """
    mesh, compute = make_mesh(run.mesh), make_compute(run)
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        spec.task.check(mesh)
        check_samples(run, omni)
        return spec, compute


def train(
    run: RunConfig,
    omni: OmniConfig,
    workdir: Workdir,
    data: TrainingData,
    extras: RunOptions = NOTHING,
    console: Console | None = None,
) -> TrainState:
    """Trains until `train.steps` or SIGTERM and returns the last state, which has been saved.

    Resumes from the workdir's newest good step, and keeps other runs out of the workdir until it is closed. Raises
    ConfigError as `set_up`, for a step that cannot be read, and while another run works in the workdir;
    RunStoppedError when a step could not be saved, and, with everything saved, when `train.nonfinite_limit` steps in a
    row were not finite.
    """
    console = console or Console(quiet=not is_process_zero())
    on_all_hosts(workdir.hold)
    compiles = CompileCounter()
    spec, compute = set_up(run, omni)
    with jax.set_mesh(spec.mesh):
        state, data_state = _start(run, omni, spec, workdir, compute)
        if state.step:
            console.print(f"{workdir.path}: resumed from step {state.step}")
        print_start_table(console, run, spec, data)
        if state.step >= run.train.steps:
            console.print(f"{workdir.path} is finished: step {state.step} of train.steps {run.train.steps}")
            return state
        warm_up_collectives(spec.mesh)
        place = BatchPlacer(run.data.rows, spec.task.batch_axes(), spec.mesh, compute.rules)
        return _Loop(run, omni, spec, workdir, data, extras, console, compiles, place).go(state, data_state)


def _start(run, omni, spec: StepSpec, workdir: Workdir, compute) -> tuple[TrainState, dict | None]:
    if workdir.latest_step() is None:
        return init_state(run, spec), None
    found = workdir.restore(None, branches_of(spec.stored), abstract_opt_state(spec))
    return from_checkpoint(spec, found.branches, found.opt_state, found.step), found.data_state


@dataclass(frozen=True)
class _Pending:
    """A step that was sent to the devices; its numbers are not read yet. Times in seconds."""

    step: int
    numbers: dict[str, jax.Array]
    batch: dict[str, np.ndarray]
    epochs: dict[str, float]
    began: float
    waited: float
    compiling: float

    def is_done(self) -> bool:
        return self.numbers["loss"].is_ready()


class _Loop:
    """One run in progress. A step's numbers are read only after the next step has been sent to the devices."""

    def __init__(self, run, omni, spec, workdir, data, extras, console, compiles, place):
        self.run, self.omni, self.spec, self.workdir, self.data = run, omni, spec, workdir, data
        self.console, self.compiles, self.place = console, compiles, place
        self.step = make_step(spec, run)
        self.counts = jax.jit(spec.task.counts)
        self.evaluation = Evaluation(run, spec, place, extras.held_out)
        self.listening = Listening(run, spec, place, extras.held_out)
        # Steps that the branches had been trained for when this run began.
        self.before = extras.parent.trained
        self.guard = NonfiniteGuard(workdir.path, run.train.nonfinite_limit, data.location)
        self.trace = StepTrace(workdir.path, extras.profile)
        device = spec.mesh.devices.flat[0]
        self.throughput = Throughput(
            spec.task.parts(), spec.groups.trainable, spec.mesh.devices.size, peak_flops(device.device_kind)
        )
        self.wandb, self.output = extras.wandb, None
        self.failed: dict[DocumentKey, str] = {}
        self.damaged: dict[DocumentKey, int] = {}
        self.unshared: FailedDocuments = {}
        self.last_end = self.idle = 0.0
        self.started_at = None

    def go(self, state: TrainState, data_state: dict | None) -> TrainState:
        if is_process_zero():
            self.output = Output(self.run, self.workdir.path, state.step, self.wandb, self.console)
            if self.listening.is_due(0):
                self.console.print(self.listening.sentence)
        steps, stop = self.data.steps(data_state), StopSignal()
        pending, saved = None, state.step
        self.started_at = state.step
        try:
            if state.step == 0 and self.evaluation.is_due(0):
                self._write({"step": 0} | self.evaluation(state))
            if state.step == 0 and self.listening.is_due(0):
                self._listen(state)
            while not stop.reached(state.step) and state.step < self.run.train.steps and not self.guard.exceeded:
                state, data_state, sent = self._send(state, steps, pending)
                if pending is not None:
                    self._write(self._read(pending))
                pending = sent
                save = state.step % self.run.checkpoint.every == 0
                hear = self.listening.is_due(state.step)
                if save or hear or self.evaluation.is_due(state.step):
                    # A saved step's numbers must be on disk: a run that resumes after it never computes them again.
                    row, pending = self._read(pending), None
                    if self.evaluation.is_due(state.step):
                        row |= self.evaluation(state)
                    self._write(row)
                if hear:
                    self._listen(state)
                if save:
                    self._save(state, data_state)
                    saved = state.step
            if pending is not None:
                self._write(self._read(pending))
            if saved != state.step:
                self._save(state, data_state)
            self.workdir.wait()
        finally:
            steps.close()
            stop.close()
            self.trace.close()
            if self.output is not None:
                self.output.close()
        self._say_why_it_ended(state, stop)
        return state

    def _send(self, state: TrainState, steps: Iterator[DataStep], before: _Pending | None):
        """Reads a step's rows and sends it to the devices: the new state, the data's, and what to read later."""
        number = state.step + 1
        self.trace.before(number)
        began = time.perf_counter()
        step = next(steps)
        waited = time.perf_counter() - began
        if before is None or before.is_done():
            self.idle += waited  # at most: the devices may have been at work for a part of it
        self._note_failed(step.failed)
        self.damaged |= step.damaged
        compiled, sending = self.compiles.count, time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = self.place(step.batch)
            trainable, moved, opt_state, numbers = self.step(state.trainable, state.frozen, state.opt_state, batch)
            numbers = numbers | {f"count_{name}": value for name, value in self.counts(batch).items()}
        self.trace.after(number, numbers)
        compiling = time.perf_counter() - sending if self.compiles.count > compiled else 0.0
        if compiling and number > self.started_at + 1:
            log.warning("step %d had to compile %d programs", number, self.compiles.count - compiled)
        sent = _Pending(number, numbers, step.batch, self.data.epochs(step.state), began, waited, compiling)
        return advance(state, trainable, moved, opt_state), step.state, sent

    def _read(self, pending: _Pending) -> Row:
        """Waits for a step's numbers: its row of metrics.jsonl."""
        numbers = {name: float(value) for name, value in pending.numbers.items()}
        now = time.perf_counter()
        # From the start of this step (or the end of the one before, still running then) until its numbers were there.
        took = now - max(pending.began, self.last_end)
        productive = max(0.0, took - self.idle - pending.compiling)
        self.last_end, self.idle = now, 0.0
        counts = {name.removeprefix("count_"): numbers.pop(name) for name in list(numbers) if name.startswith("count_")}
        self.guard.note(pending.step, numbers, pending.batch)
        numbers |= {"tokens": int(counts["tokens"]), "nonfinite_steps": self.guard.count}
        del numbers["nonfinite"]
        drop_absent_sources(numbers)
        times = {"step_time_s": took, "data_wait_s": pending.waited, "productive_s": productive}
        speed = self.throughput.of(counts, took)
        skipped = dict(self.data.skipped + Counter(self.failed.values()))
        data = {"skipped": skipped, "handled": dict(self.data.handled), "epochs": pending.epochs}
        data["damaged_packets"] = sum(self.damaged.values())
        return {"step": pending.step, **numbers, **times, **speed, "compiles": self.compiles.count, **data}

    def _write(self, row: Row) -> None:
        if self.output is not None:
            self.output.write(row)

    def _listen(self, state: TrainState) -> None:
        """Held-out clips as they come back now, to TensorBoard."""
        samples = self.listening(state)
        if self.output is not None:
            self.output.write_samples(state.step, samples)

    def _note_failed(self, failed: FailedDocuments) -> None:
        """Counts documents that could not be decoded. On several hosts the limit is checked when they have told."""
        for key, (where, cause, message) in failed.items():
            if key not in self.failed:
                self.failed[key] = cause
                log.warning("skipped %s (%s): %s", where, cause, message)
                self.unshared[key] = (where, cause, message)
        if failed and jax.process_count() == 1:
            self.data.check_failed(Counter(self.failed.values()))

    def _share_failed(self) -> None:
        """Every host learns what the others could not decode; all raise alike when it is too much."""
        if jax.process_count() == 1:
            return
        for text in all_gather_str(json.dumps([[*key, cause] for key, (_, cause, _) in self.unshared.items()])):
            self.failed |= {(source, number): cause for source, number, cause in json.loads(text)}
        self.unshared = {}
        self.data.check_failed(Counter(self.failed.values()))

    def _save(self, state: TrainState, data_state: dict) -> None:
        self._share_failed()
        branches, opt_state = to_checkpoint(self.spec, state)
        trained = dict(self.before)
        for name in {path.split(".")[0] for path in state.trainable}:
            trained[name] = trained.get(name, 0) + state.step
        self.workdir.save(
            state.step,
            branches,
            opt_state,
            data_state,
            self.omni,
            self.data.tokenizer_json,
            trained={name: trained.get(name, 0) for name in branches},
        )

    def _say_why_it_ended(self, state: TrainState, stop: StopSignal) -> None:
        if self.guard.exceeded:
            raise RunStoppedError(f"{self.guard.sentence()}; step {state.step} is saved in {self.workdir.path}")
        if stop.asked:
            self.console.print(f"stopped by SIGTERM: step {state.step} is saved in {self.workdir.path}")
        else:
            self.console.print(f"finished at step {state.step}; saved in {self.workdir.path}")
