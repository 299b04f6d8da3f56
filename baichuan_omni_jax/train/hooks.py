"""What a run does beside its steps: evaluation, checkpoints, audio samples, and the reasons to stop.

`trainer.Trainer` says in which order they are called.
"""

import json
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.loss_shares import shares_table
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.evaluation.held_out import HeldOutData, HeldOutEvaluation, Sums
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.audio_samples import AudioSampleLogger
from baichuan_omni_jax.train.hosts import is_process_zero
from baichuan_omni_jax.train.input import BatchPlacer, DocumentFailures, TrainingData
from baichuan_omni_jax.train.metrics import MetricsRecord, RunLog
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState, evaluation_values, to_checkpoint


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands after `step` finished steps: the training state, and the data's (None: at its start)."""

    step: int
    state: TrainState
    data_state: dict[str, Any] | None


class Hook:
    """One thing that a run does beside its steps. Every host calls it; what a method does not say is left out."""

    def observe(self, step: int, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a step's numbers, read while the next step is under way; `batch` has this host's rows."""

    def is_due(self, step: int) -> bool:
        """Whether `measure` and `act` are to be called after `step` finished steps."""
        return False

    def measure(self, progress: RunProgress) -> MetricsRecord:
        """Returns numbers that belong into the step's record."""
        return {}

    def act(self, progress: RunProgress) -> None:
        """Does its work; the step's record is on disk."""

    def should_stop(self, step: int) -> bool:
        """Whether the run ends after `step` finished steps. Asked before every step, of every host."""
        return False

    def finish(self, progress: RunProgress) -> None:
        """Does what is left after the last step."""

    def close(self) -> None:
        """Gives back what it holds, however the run ended."""


class EvaluationHook(Hook):
    """Held-out scores before the first step, after every `eval.every`, and after the last."""

    def __init__(self, spec: StepSpec, place: BatchPlacer, mixtures: Mapping[str, HeldOutData]) -> None:
        # As many sources as the largest mixture has: one program sums for all of them. Exchanged media count apart.
        run, sources = spec.task.run, max((len(data.sources) for data in mixtures.values()), default=1)
        sources *= 2 if any(mixture.swapped for mixture in run.eval.mixtures) else 1
        sums_of, means_of = compile_held_out(spec, sources), spec.task.held_out_means
        self._spec = spec
        self._evaluation = HeldOutEvaluation(run.eval, mixtures, place, sums_of, means_of)
        self.last: dict[str, float] = {}  # the newest scores

    def is_due(self, step: int) -> bool:
        # After the last step whatever its number is: a run ends with scores of what it leaves.
        return self._evaluation.is_due(step) or (step == self._spec.task.run.train.steps and self._evaluation.is_due(0))

    def measure(self, progress: RunProgress) -> MetricsRecord:
        self.last = self._evaluation(evaluation_values(self._spec, progress.state))
        return dict(self.last)


def compile_held_out(spec: StepSpec, sources: int) -> Callable[[Arrays, Batch], Sums]:
    """Returns the compiled (parameters by dotted name, batch) -> sums that the task's held-out scores are made of."""

    def sums_of(parameters: Arrays, batch: Batch) -> Sums:
        # All parameters as if they trained: which of them do makes no difference to a score.
        batch = spec.task.mask_untrained_targets(batch)
        return spec.task.held_out_sums(spec.assemble(parameters, {}), batch, sources)

    return jax.jit(sums_of)


class CheckpointHook(Hook):
    """Saves after every `checkpoint.every` steps and after the last one, in the background.

    Args:
        spec: the run's step.
        omni: the model's sizes, saved beside the weights.
        workdir: where steps are saved.
        originals: frozen parameters as checkpoints hold them (`from_checkpoint`).
        trained_before: by branch, the steps that it had been trained for when this run began.
        failures: documents that failed to decode, which hosts tell each other at every save.
        tokenizer_json: the text tokenizer, saved beside the weights.
        saved_step: the newest step that is saved already.
        before_save: called before each save: what a run that resumes from it will want to find.
    """

    def __init__(
        self,
        spec: StepSpec,
        omni: OmniConfig,
        workdir: Workdir,
        originals: Arrays,
        *,
        trained_before: Mapping[str, int],
        failures: DocumentFailures,
        tokenizer_json: str,
        saved_step: int,
        before_save: Callable[[], object],
    ) -> None:
        self._spec, self._omni, self._workdir, self._originals = spec, omni, workdir, originals
        self._trained_before, self._failures = dict(trained_before), failures
        self._tokenizer_json, self._saved_step = tokenizer_json, saved_step
        self._before_save = before_save

    def is_due(self, step: int) -> bool:
        # A save that failed is made good by the state of now: its own has been trained on since.
        again = self._workdir.save_failed() and self._workdir.may_retry()
        due = step > 0 and step % self._spec.task.run.checkpoint.every == 0
        return due or (again and time.monotonic() >= self._workdir.retry_at())

    def act(self, progress: RunProgress) -> None:
        self._before_save()
        # The data's state leaves out what failed on any host, so a resumed run counts it on all.
        self._failures.share_among_hosts()
        branches, opt_state = to_checkpoint(self._spec, progress.state, self._originals)
        # Steps of each branch, over all stages that trained it.
        trained = dict(self._trained_before)
        for name in {path.split(".")[0] for path in progress.state.trainable}:
            trained[name] = trained.get(name, 0) + progress.step
        self._workdir.save(
            progress.step,
            branches,
            opt_state,
            progress.data_state or {},
            self._omni,
            self._tokenizer_json,
            trained={name: trained.get(name, 0) for name in branches},
        )
        self._saved_step = progress.step

    def finish(self, progress: RunProgress) -> None:
        # The last step, if none of `checkpoint.every` was it; then the background writes are awaited.
        if self._saved_step != progress.step:
            self.act(progress)
        while True:
            try:
                return self._workdir.wait()
            except RunStoppedError:
                if not self._workdir.may_retry():
                    raise
                time.sleep(max(0.0, self._workdir.retry_at() - time.monotonic()))
                self.act(progress)


class AudioSamplesHook(Hook):
    """Held-out clips as they come back from their codes, to TensorBoard."""

    def __init__(self, logger: AudioSampleLogger, log: RunLog | None) -> None:
        self._logger, self._log = logger, log

    def is_due(self, step: int) -> bool:
        return self._logger.is_due(step)

    def act(self, progress: RunProgress) -> None:
        samples = self._logger(progress.state)
        if self._log is not None and samples is not None:
            self._log.write_samples(progress.step, samples)


class NonfiniteGuard(Hook):
    """Counts steps whose loss or gradient was not finite, since this start, and keeps their batches for inspection.

    The step itself has already left parameters and optimizer as they were. `limit` in a row end the run. The batches of
    the newest `limit` + 1 are kept; `location` names the manifest line of (source, document).

    WORKDIR/nonfinite/step_N/host_P.npz     the rows of host P: every field of docs/reference/batch.md
    WORKDIR/nonfinite/step_N/host_P.json    the step's numbers, and the manifest line of every document in these rows
    """

    def __init__(
        self, workdir: Path, limit: int, location: Callable[[int, int], str], *, shown: epath.PathLike = ""
    ) -> None:
        """`shown` is what the workdir is called in messages, where `workdir` is only a local copy of it."""
        self._folder, self._limit, self._location = workdir / "nonfinite", limit, location
        self._shown = epath.Path(shown or workdir) / "nonfinite"
        self.count = 0
        self.exceeded = False
        self._in_a_row = 0

    def observe(self, step: int, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a step's numbers; `nonfinite` of them is 0 where all was well."""
        if not numbers["nonfinite"]:
            self._in_a_row = 0
            return
        self.count += 1
        self._in_a_row += 1
        # For good: one more step is under way when this is seen, and it may be finite.
        self.exceeded |= self._in_a_row >= self._limit
        self._keep(self._folder / f"step_{step}", numbers, batch)

    def should_stop(self, step: int) -> bool:
        return self.exceeded

    def sentence(self) -> str:
        """Says why the run ended."""
        return (
            f"loss or gradient was not finite in {self._limit} steps in a row (train.nonfinite_limit); "
            f"their batches are in {self._shown}"
        )

    def _keep(self, folder: Path, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"host_{jax.process_index()}"
        fields: dict[str, Any] = dict(batch)
        np.savez(folder / f"{name}.npz", **fields)
        # Documents of these rows, by their manifest lines: what to look at first.
        pairs = np.stack([batch["source_ids"], batch["document_ids"]], -1)[batch["segment_ids"] > 0]
        documents = [self._location(*pair) for pair in np.unique(pairs, axis=0).tolist()]
        # As text: JSON has no word for NaN.
        shown = {key: repr(value) for key, value in numbers.items()}
        (folder / f"{name}.json").write_text(json.dumps({"numbers": shown, "documents": documents}, indent=1))
        # Batches are large: the oldest go. Hosts may share the folder, or each have a local one.
        there = sorted(self._folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        for old in there[: -self._limit - 1]:
            shutil.rmtree(old, ignore_errors=not is_process_zero())


class StopSignal(Hook):
    """Listens for SIGTERM until `close`: how a run learns that its machine is wanted back.

    On several hosts JAX's preemption service has the signal since `jax.distributed.initialize`: it carries the notice
    of any host to all of them and chooses a step that none has reached yet, so that all stop after the same one.
    """

    def __init__(self) -> None:
        self.received = False
        self._several = jax.process_count() > 1
        self._old: Any = None
        # Several hosts: the service handles the signal, a handler of ours would hide it.
        if not self._several:
            try:
                self._old = signal.signal(signal.SIGTERM, self._receive)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def should_stop(self, step: int) -> bool:
        """Every host must ask at every step; all get the same answer."""
        if self._several:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def close(self) -> None:
        """Puts the handler from before back."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class StepTrace:
    """Traces the steps of `span` into `WORKDIR/profile`, every host its own devices. Counts from 1, as metrics do.

    For XProf, TensorBoard's profile plugin or Perfetto.
    """

    def __init__(self, workdir: Path, span: Sequence[int] | None) -> None:
        self._folder, self._span = workdir / "profile", span or range(0)
        self._running = False

    def before(self, step: int) -> None:
        """To be called before a step is made ready."""
        if step in self._span and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """To be called when a step has been sent to the devices, with its results. Waits for the last step traced."""
        if self._running and step + 1 not in self._span:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def parse_span(text: str) -> range | None:
    """Parses `--profile`: `"3:6"` -> steps 3, 4, 5; an empty text is no steps. Raises ConfigError for anything else."""
    if not text:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) < int(parts[1]):
        raise ConfigError(f"--profile {text!r} is not START:STOP with 1 <= START < STOP (10:13 traces steps 10 to 12)")
    return range(int(parts[0]), int(parts[1]))


def print_start_table(console: Console, run: RunConfig, spec: StepSpec, data: TrainingData) -> None:
    """Prints groups with their parameters, learning rates and what is frozen; the sources' shares of the loss; then
    mesh, budgets and data.
    """
    console.print(groups_table(run, spec))
    if run.task == "omni":
        title = f"expected shares of the loss (documents weigh by {run.train.document_weighting})"
        console.print(shares_table(data.loss_shares(run.train), title))
    mesh = ", ".join(f"{axis} {size}" for axis, size in spec.mesh.shape.items())
    budgets = ", ".join(f"{size} {name}" for name, size in run.data.budgets.limits().items())
    console.print(f"mesh: {mesh}; {run.data.rows} rows a step, each at most {budgets}")
    documents = f"{data.documents} documents, {data.skipped.total()} skipped"
    console.print(f"data: {documents}; {run.train.steps} steps in {run.compute.dtype}")


def groups_table(run: RunConfig, spec: StepSpec) -> Table:
    """Lists a group and branch a line: its parameters, how many of them are frozen, and the rate of the others."""
    table = Table(title=f"{run.name}: parameters by group")
    for column in ("group", "branch", "parameters", "frozen", "peak learning rate"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    rates = {group.name: group.learning_rate for group in run.optimizer.groups}
    # A line for each group and branch.
    for (group, branch), (trainable, frozen) in sorted(_count(spec).items()):
        # A group with a rate may train nothing: rows of special tokens that are turned off.
        peak = f"{rates[group]:g}" if trainable else "frozen"
        table.add_row(group, branch, f"{trainable + frozen:,}", f"{frozen:,}", peak)
    return table


def _count(spec: StepSpec) -> dict[tuple[str, str], tuple[int, int]]:
    """Counts (trainable, frozen) parameters by (group, branch)."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    sizes = {name: value.size for name, value in spec.shapes().items()}
    for place, names in enumerate((spec.groups.trainable, spec.groups.frozen)):
        for name, group in names.items():
            counts[group, name.split(".")[0]][place] += sizes[name]
    return {key: (trainable, frozen) for key, (trainable, frozen) in counts.items()}
