"""The training loop: rows in, steps, numbers out, and the hooks; leaves on SIGTERM."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
from rich.console import Console

from baichuan_omni_jax.checkpoint import Parent, Workdir
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import RunStoppedError
from baichuan_omni_jax.evaluation.held_out import close_steps
from baichuan_omni_jax.flops.terms import peak_flops
from baichuan_omni_jax.storage import MirroredFolder
from baichuan_omni_jax.train.ability_hook import ABILITIES, AbilityHook
from baichuan_omni_jax.train.alerts import ALERTS, NonfiniteGuard
from baichuan_omni_jax.train.audio_samples import AudioSampleLogger
from baichuan_omni_jax.train.checkpoint_hook import CheckpointHook
from baichuan_omni_jax.train.goodput import EVENTS, GOODPUT
from baichuan_omni_jax.train.hooks import AudioSamplesHook, EvaluationHook, Hook, NumberStack, PendingStep, RunProgress
from baichuan_omni_jax.train.hosts import host_name, is_process_zero, on_all_hosts
from baichuan_omni_jax.train.input import BatchPlacer, DataStep, DocumentFailures, DocumentKey, TrainingData
from baichuan_omni_jax.train.metrics import (
    INTERRUPTED,
    METRICS,
    CompileCounter,
    MetricsRecord,
    RunLog,
    Throughput,
    drop_absent_sources,
)
from baichuan_omni_jax.train.profiling import StepTrace
from baichuan_omni_jax.train.run_watch import RunWatch
from baichuan_omni_jax.train.state import (
    Arrays,
    StepSpec,
)
from baichuan_omni_jax.train.step import compile_step
from baichuan_omni_jax.train.stop import StopSignal
from baichuan_omni_jax.train.suite_hook import SuiteHook
from baichuan_omni_jax.train.watchdog import WAITING

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a start may add to a run without changing what it computes.

    `parent` is where the first weights came from: their branches' steps are counted on. `held_out` has the data of
    `eval.mixtures` by name, with exchanged media and questions (`data_pipelines.held_out`) where these are asked for.
    `profile` are the steps to trace; `wandb` is a project there. `leave_when_hung` ends the process with a code of its
    own when a step does not end (`Watchdog`). `stop` listens for SIGTERM since before the data were opened.
    """

    parent: Parent = Parent()
    held_out: Mapping[str, TrainingData] = field(default_factory=dict)
    profile: range | None = None
    wandb: str = ""
    leave_when_hung: bool = False
    stop: StopSignal | None = None


class Trainer:
    """One run in progress: steps, and its hooks around them.

    A step's numbers are read only after the next step has been sent, so that the devices never wait for the host. After
    a step, this happens in this order:

    1. metrics: the numbers of the step *before* are read, shown to every hook (`observe`: the non-finite guard counts
       and keeps batches), and written.
    2. If any hook is due after this step, its own numbers are read too, and devices and host meet:
       evaluation, abilities, suites (`measure`: their scores join the step's record), then the record is written, then
       `act` of checkpoint (a saved step's numbers are on disk first: a run that resumes after it never computes them
       again) and audio samples.
    3. Before the next step every hook is asked whether to stop: non-finite guard, then SIGTERM.

    After the last step the pending numbers are written, and the checkpoint hook saves what is not saved yet.
    """

    def __init__(
        self,
        spec: StepSpec,
        omni: OmniConfig,
        workdir: Workdir,
        data: TrainingData,
        options: RunOptions,
        console: Console,
        compiles: CompileCounter,
        place: BatchPlacer,
        first_step: int,
        originals: Arrays,
    ) -> None:
        """Makes the hooks; compiles nothing yet.

        Args:
            spec: the run's step.
            omni: the model's sizes.
            workdir: where everything is written.
            data: the training mixture.
            options: what this start adds.
            console: for whom watches.
            compiles: counts programs since before the first one.
            place: puts a host's rows on the mesh.
            first_step: where the run goes on.
            originals: frozen parameters as checkpoints hold them.
        """
        run = spec.task.run
        # Files that grow are written here: the workdir itself, or a local folder that is copied to its URL.
        self._mirror = on_all_hosts(
            lambda: MirroredFolder(workdir.path, host_name(), (METRICS, GOODPUT, EVENTS, ABILITIES, ALERTS))
        )
        folder = self._mirror.path
        self._steps, self._first_step = run.train.steps, first_step
        self._workdir, self._data, self._console, self._compiles = workdir, data, console, compiles
        # Two programs a step: the step (two more on CPU, see `CompiledStep`), and its numbers as one array.
        self._place, self._step, self._stack = place, compile_step(spec), NumberStack(spec.task.batch_counts)
        self._trace = StepTrace(folder, options.profile)
        devices = spec.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        self._throughput = Throughput(spec.task.flop_terms(), spec.groups.trainable, devices.size, peak)
        self._failures = DocumentFailures(data)
        self._damaged: dict[DocumentKey, int] = {}
        self._pending: PendingStep | None = None
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # of the batches that steps were compiled for
        # When the numbers of the step before were there, and how long the devices had nothing to do since.
        self._last_end = self._idle = 0.0

        samples = AudioSampleLogger(spec, place, options.held_out)
        # Opened once nothing can refuse the run any more: it drops lines that will be written again.
        location = os.fspath(workdir.path)
        open_log = lambda: RunLog(run, folder, location, first_step, options.wandb, console)  # noqa: E731
        self._log = on_all_hosts(lambda: open_log() if is_process_zero() else None)
        if self._log is not None and samples.is_due(0):
            console.print(samples.sentence)
        self._watch = RunWatch(
            spec, folder, workdir, self._log, self._mirror.sync, leave_when_hung=options.leave_when_hung
        )
        self._guard = NonfiniteGuard(folder, run.train.nonfinite_limit, data.location, shown=workdir.path)
        self._stop = options.stop or StopSignal()
        checkpoint = CheckpointHook(
            spec,
            omni,
            workdir,
            originals,
            trained_before=options.parent.trained,
            failures=self._failures,
            tokenizer_json=data.tokenizer_json,
            # Where it goes on from the hosts' own disks, the workdir does not have that step yet.
            saved_step=first_step if not first_step or workdir.has_step(first_step) else -1,
            before_save=self._copy_numbers,
            alerts=self._watch.alerts,
        )
        evaluation = EvaluationHook(spec, place, options.held_out, self._stop.check)
        abilities = AbilityHook(
            spec,
            omni,
            options.held_out,
            data.tokenizer_json,
            workdir=folder,
            console=console,
            first_step=first_step,
            gains=lambda: evaluation.last,
        )
        # In the order in which they are called.
        self._hooks: tuple[Hook, ...] = (
            evaluation,
            abilities,
            SuiteHook(spec, omni, data.tokenizer_json, workdir=workdir.path, folder=folder, console=console),
            checkpoint,
            AudioSamplesHook(samples, self._log),
            self._guard,
            self._stop,
        )

    def fit(self, progress: RunProgress, *, owed: bool = False) -> RunProgress:
        """Runs steps until the last one, or until a hook stops the run.

        Args:
            progress: where it goes on.
            owed: whether what is due after that step was broken off, and is to be made good first.

        Raises:
            RunStoppedError: it failed.
        """
        steps = self._data.steps(progress.data_state)
        try:
            # Scores and samples of the weights that the run starts from.
            if progress.step == 0 or owed:
                self._call_due(progress)
            # A list, not a generator: on several hosts every one must ask every hook at every step.
            while not any([hook.should_stop(progress.step) for hook in self._hooks]) and progress.step < self._steps:
                # Sent first, then the step before is read: the devices go on while the host writes.
                progress, sent = self._send(progress, steps)
                self._flush()
                self._pending = sent
                self._call_due(progress)
            self._flush()
            for hook in self._hooks:
                with self._watch.beside(progress.step, hook.doing):
                    hook.finish(progress)
        finally:
            self._close(steps)
        self._say_why_it_ended(progress.step)
        return progress

    def _send(self, progress: RunProgress, steps: Iterator[DataStep]) -> tuple[RunProgress, PendingStep]:
        """Reads a step's rows and sends it to the devices; returns where the run stands, and what to read later."""
        number = progress.step + 1
        self._trace.before(number)

        # Rows. The devices are idle meanwhile only if the step before is done; at most: it may end during the wait.
        began = time.perf_counter()
        self._watch.enter(number, "reading rows")
        rows = next(steps)
        waited = time.perf_counter() - began
        if self._log is not None:
            self._log.goodput.step(number, time.time() - waited, waited)
        if self._pending is None or self._pending.is_done():
            self._idle += waited
        self._failures.note(rows.failed)
        self._damaged |= rows.damaged

        batch = self._place(rows.batch)
        if self._watch.replays(number):
            # The step before is through then, and keeps its own time.
            self._flush()
        replaying = self._watch.replay(number, progress.state, batch)
        # The step: dispatched, not awaited. Compiling blocks, so a call that compiles is timed as compiling.
        compiled, sending = self._compiles.count, time.perf_counter()
        shapes = tuple(value.shape for value in rows.batch.values())
        known = shapes in self._shapes
        self._shapes.add(shapes)
        self._watch.enter(number, WAITING if known else "compiling", in_step=known)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, numbers = self._step(progress.state, batch)
            stacked = self._stack(numbers, batch)
        self._trace.after(number, stacked)
        sending = time.perf_counter() - sending
        compiling = sending if self._compiles.count > compiled else 0.0
        if compiling and number > self._first_step + 1:
            log.warning("step %d had to compile %d programs", number, self._compiles.count - compiled)

        epochs = self._data.epochs(rows.state)
        sent = PendingStep(number, stacked, rows.batch, epochs, began, waited, sending, compiling + replaying)
        return RunProgress(number, state, rows.state), sent

    def _call_due(self, progress: RunProgress) -> None:
        """Calls the hooks that are due after a step, with its record written between `measure` and `act`."""
        # No hook, no meeting: the step's numbers stay pending.
        due = [hook for hook in self._hooks if hook.is_due(progress.step)]
        if not due:
            return
        record: MetricsRecord = {} if self._pending is None else self._read(self._pending)
        self._pending = None
        # A machine that is wanted back does not wait for scores: the next start makes them (`evaluation_owed`).
        if scoring := [hook for hook in due if hook.scores]:
            with self._stop.breakable():
                for hook in scoring:
                    with self._watch.beside(progress.step, hook.doing):
                        record |= hook.measure(progress)
            if self._stop.interrupted:
                record[INTERRUPTED] = 1
        # On disk before anything else: a checkpoint without its step's numbers would leave a gap.
        if record:
            self._write({"step": progress.step} | record)
        for hook in due:
            with self._watch.beside(progress.step, hook.doing):
                hook.act(progress)

    def _flush(self) -> None:
        """Writes the numbers of a step that was sent before."""
        if self._pending is not None:
            self._write(self._read(self._pending))
            self._pending = None

    def _read(self, pending: PendingStep) -> MetricsRecord:
        """Waits for a step's numbers: its line of metrics.jsonl."""
        # This is where the host waits for the devices.
        self._watch.enter(pending.step, WAITING)
        numbers, counts = self._stack.read(pending.numbers)
        now = time.perf_counter()

        # From the start of this step (or the end of the one before, still running then) until its numbers were there.
        took = now - max(pending.began, self._last_end)
        idle, self._idle, self._last_end = self._idle, 0.0, now
        productive = max(0.0, took - idle - pending.compiling)
        times = {"step_time_s": took, "data_wait_s": pending.waited, "productive_s": productive}
        self._stop.begin()
        parts = {"rows_s": pending.waited, "send_s": pending.sending, "step_s": took}
        by_host = self._watch.finish_step(pending.step, numbers, parts, idle)
        for hook in self._hooks:
            hook.observe(pending.step, numbers, pending.batch)
        # The flag becomes a count since this start; sources with nothing to learn from have no loss.
        numbers |= {"tokens": int(counts["tokens"]), "nonfinite_steps": self._guard.count}
        del numbers["nonfinite"]
        drop_absent_sources(numbers)
        return {
            "step": pending.step,
            **numbers,
            **times,
            **self._throughput.rates(counts, took),
            **self._workdir.take_times(),
            "compiles": self._compiles.count,
            "skipped": dict(self._data.skipped + self._failures.causes),
            "oversize": dict(self._data.handled),
            "epochs": pending.epochs,
            "damaged_packets": sum(self._damaged.values()),
            **by_host,
        }

    def _write(self, record: MetricsRecord) -> None:
        if self._log is not None:
            self._log.write(record)

    def _copy_numbers(self) -> None:
        """Copies the numbers up to now to where the workdir is, if that is a URL."""
        if self._log is not None:
            self._log.flush()
        self._mirror.sync()

    def _close(self, steps: Iterator[DataStep]) -> None:
        # Workers first, however the run ended.
        close_steps(steps)
        self._watch.close()
        for hook in self._hooks:
            hook.close()
        self._trace.close()
        if self._log is not None:
            self._log.close()
        self._mirror.close()

    def _say_why_it_ended(self, step: int) -> None:
        if self._guard.exceeded:
            raise RunStoppedError(f"{self._guard.sentence()}; step {step} is saved in {self._workdir.path}")
        if self._stop.received:
            self._console.print(f"stopped by SIGTERM: step {step} is saved in {self._workdir.path}")
        else:
            self._console.print(f"finished at step {step}; saved in {self._workdir.path}")
