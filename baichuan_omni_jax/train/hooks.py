"""What a run does beside its steps: the form of a hook, held-out evaluation, audio samples.

`trainer.Trainer` says in which order hooks are called; further ones: `checkpoint_hook`, `alerts`, `stop`,
`ability_hook`, `suite_hook`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.evaluation.held_out import HeldOutData, HeldOutEvaluation, Sums
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.audio_samples import AudioSampleLogger
from baichuan_omni_jax.train.input import BatchPlacer
from baichuan_omni_jax.train.metrics import MetricsRecord, RunLog
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState, evaluation_values


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands after `step` finished steps: the training state, and the data's (None: at its start)."""

    step: int
    state: TrainState
    data_state: dict[str, Any] | None


class NumberStack:
    """Puts all numbers of a step into one array on the devices, so that the host fetches one a step, not dozens.

    `count` counts what a batch holds; it runs in the same program.
    """

    def __init__(self, count: Callable[[Batch], dict[str, jax.Array]]) -> None:
        self._names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

        def stack(numbers: dict[str, jax.Array], batch: Batch) -> jax.Array:
            counts = count(batch)
            # Told while the program is traced: which number is at which place.
            self._names = (tuple(numbers), tuple(counts))
            return jnp.stack([jnp.float32(value) for value in (*numbers.values(), *counts.values())])

        self._stack = jax.jit(stack)

    def __call__(self, numbers: dict[str, jax.Array], batch: Batch) -> jax.Array:
        """Returns fp32 scalars as one array: those of the step, then the counts of its batch."""
        return self._stack(numbers, batch)

    def read(self, stacked: jax.Array) -> tuple[dict[str, float], dict[str, float]]:
        """Waits for the array; returns the step's numbers and the counts by name."""
        values = jax.device_get(stacked).tolist()
        names, counts = self._names
        return dict(zip(names, values, strict=False)), dict(zip(counts, values[len(names) :], strict=True))


@dataclass(frozen=True)
class PendingStep:
    """A step that was sent to the devices; its numbers are not read yet. Times in seconds."""

    step: int
    numbers: jax.Array  # of a `NumberStack`
    batch: dict[str, np.ndarray]
    epochs: dict[str, float]
    began: float
    waited: float
    sending: float
    compiling: float

    def is_done(self) -> bool:
        """Whether the devices have finished it."""
        numbers: Any = self.numbers  # is_ready is missing in jax's stubs
        return numbers.is_ready()


class Hook:
    """One thing that a run does beside its steps. Every host calls it; what a method does not say is left out.

    `doing` is what the run is at meanwhile, in words; hooks that `measure` say so by `scores`.
    """

    doing = "between steps"
    scores = False

    def observe(self, step: int, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a step's numbers, read while the next step is under way; `batch` has this host's rows."""

    def is_due(self, step: int) -> bool:
        """Whether `measure` and `act` are to be called after `step` finished steps."""
        return False

    def measure(self, progress: RunProgress) -> MetricsRecord:
        """Returns numbers that belong into the step's record; SIGTERM may break it off."""
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

    doing, scores = "evaluating", True

    def __init__(
        self,
        spec: StepSpec,
        place: BatchPlacer,
        mixtures: Mapping[str, HeldOutData],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Compiles nothing yet; `check`, called before every batch, may raise to break an evaluation off."""
        # As many sources as the largest mixture has: one program sums for all of them. Exchanged media count apart.
        run, sources = spec.task.run, max((len(data.sources) for data in mixtures.values()), default=1)
        sources *= 2 if any(mixture.swapped for mixture in run.eval.mixtures) else 1
        sums_of, means_of = compile_held_out(spec, sources), spec.task.held_out_means
        self._spec = spec
        self._evaluation = HeldOutEvaluation(run.eval, mixtures, place, sums_of, means_of, check)
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


class AudioSamplesHook(Hook):
    """Held-out clips as they come back from their codes, to TensorBoard."""

    doing = "making audio samples"

    def __init__(self, logger: AudioSampleLogger, log: RunLog | None) -> None:
        self._logger, self._log = logger, log

    def is_due(self, step: int) -> bool:
        return self._logger.is_due(step)

    def act(self, progress: RunProgress) -> None:
        samples = self._logger(progress.state)
        if self._log is not None and samples is not None:
            self._log.write_samples(progress.step, samples)
