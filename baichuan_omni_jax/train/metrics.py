"""Where a run's numbers go: `metrics.jsonl` (one object a step), TensorBoard, W&B; and what is made of raw numbers."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from baichuan_omni_jax.flops.terms import FlopTerm, flops_by_branch
from baichuan_omni_jax.storage import atomic_write
from baichuan_omni_jax.train.audio_samples import SoundSamples
from baichuan_omni_jax.train.wandb import WandbWriter

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# A step's numbers; nested dicts (skip counts by cause) become `name/cause` where names are flat.
Row = dict[str, float | int | dict[str, int | float]]


def drop_absent_sources(numbers: dict[str, float]) -> None:
    """Removes `loss/SOURCE` of sources that a step had nothing to learn from: their `share/SOURCE` is 0."""
    for name in [name for name, value in numbers.items() if name.startswith("share/") and value == 0]:
        numbers.pop(name.replace("share/", "loss/", 1), None)


class CompileCounter:
    """Counts programs that XLA has compiled in this process since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: object) -> None:
        self.count += event == _COMPILE_EVENT


class Throughput:
    """Speed of a step: tokens a second and chip, model FLOPs, and their share of what the chips could do (MFU).

    `parts` are the task's matrix products, `trainable` the names of the parameters that train; `peak` is FLOP/s of one
    chip, None where it is not known (then there is no MFU).
    """

    def __init__(self, parts: Sequence[FlopTerm], trainable: Collection[str], chips: int, peak: float | None) -> None:
        self._parts, self._trainable, self._chips, self._peak = parts, frozenset(trainable), chips, peak

    def of(self, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
        """`counts` as from the task's `counts`, of the global batch; `seconds` that the step took."""
        seconds = max(seconds, 1e-9)
        flops = flops_by_branch(self._parts, counts, self._trainable)
        numbers = {"tokens_per_s_per_chip": counts["tokens"] / seconds / self._chips}
        numbers |= {f"flops_{name}": value for name, value in flops.items()}
        if self._peak is None:
            return numbers
        possible = seconds * self._chips * self._peak
        shares = {f"mfu_{name}": value / possible for name, value in flops.items()}
        return numbers | {"mfu": sum(shares.values())} | shares


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl`, to TensorBoard events under `workdir/tensorboard`, and to W&B if given.

    A resumed run first drops lines past the step it resumes from: they will be written again. `kept` are the others.
    """

    def __init__(self, workdir: Path, resumed_from: int, wandb: WandbWriter | None = None):
        self._path = workdir / "metrics.jsonl"
        self.kept = self._keep_until(resumed_from)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_from + 1)
        self._wandb = wandb

    def write(self, row: Row) -> None:
        """One step's numbers. JSON has no word for a number that is not finite: there it is null."""
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")
        self._file.flush()
        flat = _flatten(row)
        for name, number in flat.items():
            if name != "step" and math.isfinite(number):
                self._events.add_scalar(name, number, row["step"])
        if self._wandb is not None:
            self._wandb.write(flat)

    def write_samples(self, step: int, samples: SoundSamples) -> None:
        """Sounds, as WAV, and pictures, to TensorBoard alone."""
        for name, (wave, rate) in samples.waves.items():
            self._events.add_audio(name, wave, step, sample_rate=rate)
        for name, picture in samples.pictures.items():
            self._events.add_image(name, picture, step, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.close()

    def _keep_until(self, step: int) -> list[Row]:
        """A run that starts over (step 0) keeps nothing. Lines that a crash damaged are dropped, the others kept."""
        if not self._path.exists():
            return []
        # Bytes: what a crash of the machine left need not be UTF-8.
        lines = self._path.read_bytes().split(b"\n") if step else []
        kept = [row for row in map(_parse, lines) if row is not None and row["step"] <= step]
        with atomic_write(self._path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept))
        return kept


def _parse(line: bytes) -> Row | None:
    """A line's row; None for one that a killed run or machine left cut, as zeros or as other bytes."""
    try:
        row = json.loads(line.decode("utf-8"))
        return row if isinstance(row, dict) and type(row.get("step")) is int else None
    except (ValueError, RecursionError):
        return None


def _flatten(row: Row) -> dict[str, float | int]:
    flat = {}
    for name, value in row.items():
        flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _plain(value: float | int | dict) -> float | int | dict | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
