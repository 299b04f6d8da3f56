"""What a run notices of itself: steps whose numbers are not finite."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from baichuan_omni_jax.train.hooks import Hook
from baichuan_omni_jax.train.hosts import is_process_zero


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
