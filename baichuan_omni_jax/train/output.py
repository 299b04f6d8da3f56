"""What the leading host alone writes: numbers to files and services, and a line for who watches."""

from pathlib import Path

from rich.console import Console

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.train.audio_samples import SoundSamples
from baichuan_omni_jax.train.goodput import Goodput
from baichuan_omni_jax.train.metrics import MetricsWriter, Row
from baichuan_omni_jax.train.report import ProgressLine
from baichuan_omni_jax.train.wandb import WandbWriter


class Output:
    """Hands rows on to all that shows them, with what only the whole run knows: goodput and counts since step 0.

    `step` is where the run goes on. Raises ConfigError when `wandb`, a project there, is given and cannot be used.
    """

    def __init__(self, run: RunConfig, workdir: Path, step: int, wandb: str, console: Console) -> None:
        self._metrics = MetricsWriter(workdir, step, WandbWriter(wandb, run, workdir) if wandb else None)
        kept = [row for row in self._metrics.kept if "loss" in row]
        self._goodput = Goodput(workdir, kept)
        self._nonfinite = kept[-1].get("nonfinite_steps", 0) if kept else 0
        self._line = ProgressLine(console, run.train.steps, step)

    def write(self, row: Row) -> None:
        """A step's row, or one that has nothing but an evaluation."""
        if "loss" in row:
            row = row | {"nonfinite_steps": self._nonfinite + row["nonfinite_steps"]}
            row["goodput"] = self._goodput.note(row["productive_s"])
            self._line.show(row)
        self._metrics.write(row)

    def write_samples(self, step: int, samples: SoundSamples) -> None:
        """What became of held-out clips after `step`."""
        self._metrics.write_samples(step, samples)

    def close(self) -> None:
        self._metrics.close()
        self._line.close()
