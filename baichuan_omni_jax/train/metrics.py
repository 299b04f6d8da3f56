"""Where a run's numbers go: `metrics.jsonl` (one object a step), TensorBoard, W&B, terminal; what is made of them."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from baichuan_omni_jax.config import RunConfig, to_dict
from baichuan_omni_jax.errors import ConfigError, storage_error
from baichuan_omni_jax.flops.terms import FlopTerm, flops_by_branch
from baichuan_omni_jax.storage import atomic_write
from baichuan_omni_jax.train.audio_samples import AudioSamples
from baichuan_omni_jax.train.goodput import Goodput

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# 1 in the record of a step whose scores are missing, as SIGTERM came while they were made.
INTERRUPTED = "evaluation_interrupted"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
# Keys of earlier versions: a run does not go on where its lines have them, as no reader finds both names.
RENAMED_KEYS = {
    "audio_scale": "audio_loss_scale",
    "seconds": "audio_seconds",
    "quantised_share": "quantized_share",
    "handled": "oversize",
}

# A step's numbers; nested dicts (skip counts by cause) become `name/cause` where names are flat.
MetricsRecord = dict[str, Any]


class RunLog:
    """Hands a run's numbers on to all that shows them, with what only the whole run knows: goodput, and counts since
    step 0. Process zero alone has one.

    Raises ConfigError when `wandb`, a project there, is given and cannot be used.
    """

    def __init__(self, run: RunConfig, folder: Path, workdir: str, step: int, wandb: str, console: Console) -> None:
        """Opens the files of `folder`.

        Args:
            run: the run's configuration.
            folder: where its numbers are written: the workdir, or a local copy of what is there.
            workdir: what the workdir is called, path or URL.
            step: where the run goes on.
            wandb: a project of W&B; "": none.
            console: where the progress line goes.
        """
        self._metrics = MetricsWriter(folder, step, WandbWriter(wandb, run, folder, workdir) if wandb else None)
        kept = [record for record in self._metrics.kept if "loss" in record]
        self.goodput = Goodput(folder, kept, run.name)
        counted = kept[-1].get("nonfinite_steps") if kept else 0
        self._nonfinite = counted if isinstance(counted, int) else 0
        self._line = ProgressLine(console, run.train.steps, step)

    def write(self, record: MetricsRecord) -> None:
        """Writes a step's record, or one that has nothing but an evaluation."""
        if "loss" in record:
            record = record | {"nonfinite_steps": self._nonfinite + record["nonfinite_steps"]}
            record["goodput"] = self.goodput.note(record["productive_s"])
            self._line.show(record)
        self._metrics.write(record)

    def write_samples(self, step: int, samples: AudioSamples) -> None:
        """Writes what became of held-out clips after `step`."""
        self._metrics.write_samples(step, samples)

    def flush(self) -> None:
        """Puts into the files what was written up to now: they are about to be copied."""
        self._metrics.flush()

    def close(self) -> None:
        """Ends files, services and the progress line."""
        self._metrics.close()
        self.goodput.close()
        self._line.close()


def load_wandb() -> ModuleType:
    """Imports the package: an extra, so only where it is wanted. Raises ConfigError when it is not installed."""
    try:
        import wandb
    except ImportError as error:
        message = "--wandb needs the package wandb: python -m pip install 'baichuan_omni_jax[wandb]'"
        raise ConfigError(message) from error
    return wandb


class WandbWriter:
    """One W&B run a workdir: a run that is resumed goes on there.

    Without a network or an account the numbers are kept under `folder/wandb` for `wandb sync`. Raises ConfigError
    when the package is not installed.
    """

    def __init__(self, project: str, run: RunConfig, folder: Path, workdir: str) -> None:
        wandb = load_wandb()
        settings = {
            "project": project,
            "name": f"{run.name} {workdir.rpartition('/')[2]}",
            # From the workdir's path, so that a restart finds its run.
            "id": hashlib.sha256(workdir.encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": str(folder),
            "config": to_dict(run),
        }
        try:
            self._run = wandb.init(**settings)
        except Exception as error:  # whatever keeps W&B away must not keep the run from training
            log.warning("W&B cannot be reached (%s); numbers are kept in %s/wandb for `wandb sync`", error, folder)
            self._run = wandb.init(**settings | {"mode": "offline"})
        # Steps that a killed run repeats come twice: W&B's own counter would refuse the second time.
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: dict[str, float | int]) -> None:
        """Sends one step's numbers, names flat."""
        self._run.log(numbers)

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl`, to TensorBoard events under `workdir/tensorboard`, and to W&B if given.

    A resumed run first drops lines past the step it resumes from: they will be written again. `kept` are the others.
    """

    def __init__(self, workdir: Path, resumed_from: int, wandb: WandbWriter | None = None):
        self._path = workdir / METRICS
        self.kept = self._keep_until(resumed_from)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_from + 1)
        writer: Any = self._events.file_writer.event_writer  # type: ignore[union-attr]  it is made at once
        writer._ev_writer = writer._worker._record_writer = _UntilRefused(writer._ev_writer, self._events.logdir)
        self._wandb = wandb

    def write(self, record: MetricsRecord) -> None:
        """Writes one step's numbers. JSON has no word for a number that is not finite: there it is null."""
        # Flushed line by line: a killed run leaves at most one cut line.
        strict = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            self._file.write(json.dumps(strict) + "\n")
            self._file.flush()
        except OSError as error:
            raise storage_error(error, f"{self._path} cannot be written") from error
        # TensorBoard and W&B know no nested numbers: `skipped/unreadable`.
        flat: dict[str, float | int] = {}
        for name, value in record.items():
            flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        for name, number in flat.items():
            if name != "step" and math.isfinite(number):
                self._events.add_scalar(name, number, record["step"])
        if self._wandb is not None:
            self._wandb.write(flat)

    def write_samples(self, step: int, samples: AudioSamples) -> None:
        """Writes audio, as WAV, and images, to TensorBoard alone."""
        for name, (wave, rate) in samples.waves.items():
            self._events.add_audio(name, wave, step, sample_rate=rate)
        for name, image in samples.images.items():
            self._events.add_image(name, image, step, dataformats="HWC")
        self._events.flush()

    def flush(self) -> None:
        """Puts TensorBoard's events into their file; lines are there already."""
        self._events.flush()

    def close(self) -> None:
        """Ends files and services."""
        # What a full disk refused has been told, and is refused once more.
        with suppress(OSError):
            self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.close()

    def _keep_until(self, step: int) -> list[MetricsRecord]:
        """A run that starts over (step 0) keeps nothing. Lines that a crash damaged are dropped, the others kept."""
        if not self._path.exists():
            return []
        # Bytes: what a crash of the machine left need not be UTF-8.
        lines = self._path.read_bytes().split(b"\n") if step else []
        kept = [record for record in map(_parse, lines) if record is not None and record["step"] <= step]
        # Before anything is written: the file stays as it is for whoever renames its keys.
        refuse_renamed_keys(self._path, kept)
        with atomic_write(self._path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept))
        return kept


class _UntilRefused:
    """TensorBoard's file, until something cannot be written to it: then without. Told once.

    Its thread would die of a full disk, and the run wait for ever at a queue that nobody empties.
    """

    def __init__(self, writer: Any, folder: str) -> None:
        self._writer, self._folder, self._refused = writer, folder, False

    def write_event(self, event: Any) -> None:
        """Writes one event."""
        self._unless_refused(lambda: self._writer.write_event(event))

    def flush(self) -> None:
        """Puts into the file what was written."""
        self._unless_refused(self._writer.flush)

    def close(self) -> None:
        """Ends the file."""
        self._unless_refused(self._writer.close)

    def _unless_refused(self, work: Callable[[], object]) -> None:
        if self._refused:
            return
        try:
            work()
        except OSError as error:
            self._refused = True
            log.warning("%s gets no more numbers, it cannot be written: %s", self._folder, error.strerror or error)


def _parse(line: bytes) -> MetricsRecord | None:
    """A line's record; None for one that a killed run or machine left cut, as zeros or as other bytes."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # an editor may have put a byte order mark in front
        return record if isinstance(record, dict) and type(record.get("step")) is int else None
    except (ValueError, RecursionError):
        return None


def evaluation_owed(workdir: epath.Path, step: int) -> bool:
    """Whether the evaluation after `step` was broken off and has not been made since. Process zero's to ask."""
    path = workdir / METRICS
    if not path.exists():
        return False
    records = [record for record in map(_parse, path.read_bytes().split(b"\n")) if record is not None]
    of_step = [record for record in records if record["step"] == step]
    return bool(of_step) and INTERRUPTED in of_step[-1]


# Parts of the loss, of all tasks, in the order they are shown.
_LOSS_PARTS = ("text", "audio", "reconstruction", "transcript", "commitment", "flow", "prior")


class ProgressLine:
    """Shows step, ETA, loss, tokens/s and fill on one line; on a terminal that cannot redraw, a line now and then."""

    def __init__(self, console: Console, steps: int, done: int, every: int = 10):
        self._console, self._steps, self._every = console, steps, every
        # Drawn only on a terminal; elsewhere lines are printed now and then.
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, numbers="")
        self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """Shows a step: `record` is a line of metrics.jsonl."""
        speed = record["tokens"] / max(record["step_time_s"], 1e-9)
        parts = ", ".join(f"{name} {record[f'loss_{name}']:.3f}" for name in _LOSS_PARTS if f"loss_{name}" in record)
        numbers = f"loss {record['loss']:.3f} ({parts}) {speed:,.0f} tokens/s, fill {record['fill_tokens']:.2f}"
        if "mfu" in record:
            numbers += f", MFU {record['mfu']:.2f}"
        self._bar.update(self._task, completed=record["step"], numbers=numbers)
        if not self._console.is_terminal and (record["step"] % self._every == 0 or record["step"] == self._steps):
            left = (self._steps - record["step"]) * record["step_time_s"]
            self._console.print(
                f"step {record['step']}/{self._steps} {numbers}, {left / 60:.1f} min left", soft_wrap=True
            )

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.stop()


class Throughput:
    """Measures a step's speed: tokens a second and chip, model FLOPs, and their share of what the chips could do (MFU).

    `terms` are the task's matrix products, `trainable` the names of the parameters that train; `peak` is FLOP/s of one
    chip, None where it is not known (then there is no MFU).
    """

    def __init__(self, terms: Sequence[FlopTerm], trainable: Collection[str], chips: int, peak: float | None) -> None:
        self._terms, self._trainable, self._chips, self._peak = terms, frozenset(trainable), chips, peak

    def rates(self, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Returns a step's rates from its `batch_counts`, of the global batch, and the seconds that it took."""
        # A clock may not have moved.
        seconds = max(seconds, 1e-9)
        flops = flops_by_branch(self._terms, counts, self._trainable)
        numbers = {"tokens_per_s_per_chip": counts["tokens"] / seconds / self._chips}
        numbers |= {f"flops_{name}": value for name, value in flops.items()}
        if self._peak is None:
            return numbers
        possible = seconds * self._chips * self._peak
        shares = {f"mfu_{name}": value / possible for name, value in flops.items()}
        return numbers | {"mfu": sum(shares.values())} | shares


class CompileCounter:
    """Counts programs that XLA has compiled in this process since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == _COMPILE_EVENT


def refuse_renamed_keys(path: Path, records: Sequence[MetricsRecord]) -> None:
    """Raises ConfigError naming the file, a key that an earlier version wrote into these records, and today's name."""
    for key in dict.fromkeys(key for record in records for key in record):
        if key.startswith("share/"):
            new = f"loss_{key}"
        else:
            new = key.replace("unquantised", "unquantized") if "unquantised" in key else RENAMED_KEYS.get(key, key)
        if new != key:
            raise ConfigError(f"{path}: the key {key} is now {new}: rename it there, or move the file away, to go on")


def drop_absent_sources(numbers: dict[str, float]) -> None:
    """Removes `loss/SOURCE` of sources that a step had nothing to learn from: their `loss_share/SOURCE` is 0."""
    for name in [name for name, value in numbers.items() if name.startswith("loss_share/") and value == 0]:
        numbers.pop(name.replace("loss_share/", "loss/", 1), None)
