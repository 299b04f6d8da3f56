"""What a run notices of itself: numbers that mean trouble, and steps whose numbers are not finite.

WORKDIR/alerts.jsonl    one object an alert: `time`, `step`, `kind`, `text`; they stay when a run is resumed
"""

import json
import logging
import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from etils import epath

from baichuan_omni_jax.config import WatchConfig
from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.train.hooks import Hook
from baichuan_omni_jax.train.hosts import host_name, is_process_zero

log = logging.getLogger(__name__)

ALERTS = "alerts.jsonl"
# Steps in which an alert of one kind is not repeated.
_QUIET = 100
# Steps that a median is of, and steps before it is trusted; fewer tell a gradient that has exploded.
_WINDOW, _ENOUGH, _FEW = 64, 16, 3
# Of the median gradient norm: beyond it no batch is to blame.
_EXPLODED = 1000.0
# Steps in a row with a loss beyond the usual: no longer a spike.
_LASTING = 5


class AlertKind(StrEnum):
    """What an alert is about."""

    LOSS_SPIKE = "loss_spike"
    GRADIENT_SPIKE = "gradient_spike"
    NONFINITE = "nonfinite"
    DIVERGENCE = "divergence"
    DATA_WAIT = "data_wait"
    SLOW_SAVE = "slow_save"
    HANG = "hang"
    CORRUPTION = "corruption"


class AlertLog:
    """Appends alerts to `alerts.jsonl` of a folder, and to the log. Safe to call from threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ALERTS
        self._told: dict[AlertKind, int] = {}
        self._lock = threading.Lock()

    def tell(self, kind: AlertKind, step: int, text: str) -> None:
        """Tells an alert, unless one of its kind was told in the last 100 steps."""
        with self._lock:
            if 0 <= step - self._told.get(kind, -_QUIET) < _QUIET:
                return
            self._told[kind] = step
            log.warning("alert at step %d (%s): %s", step, kind, text)
            line = json.dumps({"time": round(time.time(), 3), "step": step, "kind": kind, "text": text})
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:  # the log has it: no run ends for a note about it
                log.warning("%s cannot be written: %s", self._path, error.strerror or error)


class StepAlerts:
    """Looks at a step's numbers beside those of the steps before, and tells what is out of the ordinary.

    Args:
        config: the limits.
        alerts: where it is told.
        keep_good: called with the first step of a divergence; keeps the newest checkpoint from before it for good, and
            returns its step, None where there is none.
    """

    def __init__(self, config: WatchConfig, alerts: AlertLog, keep_good: Callable[[int], int | None]) -> None:
        self._config, self._alerts, self._keep_good = config, alerts, keep_good
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)  # natural logarithms: norms vary by factors
        self._waits: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._begun = False
        self._high = 0  # steps in a row with a high loss
        self._diverged: int | None = None  # the newest step that did

    def check(self, step: int, numbers: Mapping[str, float], took: float, idle: float) -> None:
        """Looks at one step.

        Args:
            step: its number.
            numbers: its metrics, as the devices returned them.
            took: seconds that it took.
            idle: seconds of these in which the devices waited for rows.
        """
        # The first step of a start compiles, and its rows wait for workers that have yet to start.
        if self._begun:
            self._check_data(step, took, idle)
        self._begun = True
        if numbers["nonfinite"]:
            self._alerts.tell(AlertKind.NONFINITE, step, "loss or gradient is not finite: the step changed nothing")
            return
        if not self._config.spike:
            return
        loss, norm = numbers["loss"], math.log(max(numbers["gradient_norm"], 1e-30))
        loss_score, norm_score = _score(self._losses, loss, 0.02), _score(self._norms, norm, 0.1, relative=False)
        cause = self._divergence(numbers, norm, loss_score)
        if cause:
            self._tell_divergence(step, cause)
        else:
            self._check_spikes(step, numbers, loss_score, norm_score)
        self._losses.append(loss)
        self._norms.append(norm)

    def _check_spikes(self, step: int, numbers: Mapping[str, float], loss_score: float, norm_score: float) -> None:
        for kind, name, score in (
            (AlertKind.LOSS_SPIKE, "loss", loss_score),
            (AlertKind.GRADIENT_SPIKE, "gradient_norm", norm_score),
        ):
            if score > self._config.spike:
                text = f"{name} {numbers[name]:.4g} is {score:.1f} standard deviations above the last steps' median"
                self._alerts.tell(kind, step, text)

    def _check_data(self, step: int, took: float, idle: float) -> None:
        self._waits.append((took, idle))
        whole, waited = (sum(column) for column in zip(*self._waits, strict=True))
        if len(self._waits) >= _ENOUGH and waited > self._config.data_wait * whole:
            share = waited / whole
            text = f"devices waited for rows in {share:.0%} of the last {len(self._waits)} steps' time: data.workers"
            self._alerts.tell(AlertKind.DATA_WAIT, step, text)

    def _divergence(self, numbers: Mapping[str, float], norm: float, loss_score: float) -> str:
        """Says what shows that the run diverges; "" where nothing does."""
        # An update beyond the parameters leaves nothing of what they have learned.
        for name, update in numbers.items():
            kind, _, group = name.partition("/")
            size = numbers.get(f"parameter_norm/{group}", 0.0) if kind == "update_norm" else 0.0
            if size and update > self._config.update_share * size:
                rate = numbers[f"learning_rate/{group}"]
                return (
                    f"the update of group {group} is {update / size:.3g} times its parameters (learning rate {rate:g})"
                )
        if len(self._norms) >= _FEW and norm > median(self._norms) + math.log(_EXPLODED):
            usual = math.exp(median(self._norms))
            return f"gradient_norm {numbers['gradient_norm']:.3g} is beyond {_EXPLODED:g} times the usual {usual:.3g}"
        self._high = self._high + 1 if loss_score > self._config.spike else 0
        if self._high >= _LASTING:
            return f"the loss has been far above the usual {median(self._losses):.4g} for {self._high} steps"
        return ""

    def _tell_divergence(self, step: int, cause: str) -> None:
        # Its first step alone: what is saved later holds parameters that are spoiled already, calm as it may look.
        before, self._diverged = self._diverged, step
        if before is not None and step - before <= _WINDOW:
            return
        kept = keep_good_step(self._keep_good, step - max(self._high - 1, 0))
        self._alerts.tell(AlertKind.DIVERGENCE, step, f"the run diverges: {cause}; {kept}")


def keep_good_step(keep_newest: Callable[[int], int | None], before: int) -> str:
    """Keeps the newest step before step `before` and says which it is; what cannot be kept ends no run."""
    try:
        good = keep_newest(before)
    except (ConfigError, StorageError, OSError) as error:
        return f"the step before it could not be kept: {error}"
    return "nothing was saved before it" if good is None else f"step {good} from before is kept"


def _score(before: Collection[float], value: float, floor: float, *, relative: bool = True) -> float:
    """Returns how many standard deviations a value lies above the median of those before; 0 for too few of them.

    The deviation is that of a normal distribution with the same median distance from the median, which one spike does
    not move, and `floor` (times the median where `relative`) at least.
    """
    if len(before) < _ENOUGH:
        return 0.0
    middle = median(before)
    deviation = 1.4826 * median(abs(each - middle) for each in before)
    return (value - middle) / max(deviation, floor * abs(middle) if relative else floor, 1e-12)


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
        name = host_name()
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
