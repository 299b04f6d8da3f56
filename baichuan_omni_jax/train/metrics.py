"""Where a run's numbers go: `metrics.jsonl` (one object a step), TensorBoard, and the count of compilations."""

import json
import os
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts programs that XLA has compiled in this process since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: object) -> None:
        self.count += event == _COMPILE_EVENT


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and TensorBoard events under `workdir/tensorboard`.

    A resumed run first drops lines past the step it resumes from: they will be written again.
    """

    def __init__(self, workdir: Path, resumed_from: int):
        self._path = workdir / "metrics.jsonl"
        self._keep_until(resumed_from)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_from + 1)

    def write(self, row: dict[str, float | int | dict[str, int]]) -> None:
        """One step's numbers; nested dicts (skip counts by cause) become `name/cause` in TensorBoard."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            values = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, number in values.items():
                if key != "step":
                    self._events.add_scalar(key, number, row["step"])

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self._path)


def _step_of(line: str) -> int | None:
    """The step of a line; None for one that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
