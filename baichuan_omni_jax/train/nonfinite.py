"""Steps whose loss or gradient was not finite: counted, their batches kept for inspection, and too many end the run.

WORKDIR/nonfinite/step_N/host_P.npz     the rows of host P: every field of docs/reference/batch.md
WORKDIR/nonfinite/step_N/host_P.json    the step's numbers, and the manifest line of every document in these rows
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from baichuan_omni_jax.train.hosts import is_process_zero


class NonfiniteGuard:
    """Counts since this start. The step itself has already left parameters and optimizer as they were.

    `limit` in a row are too many: `exceeded`. The batches of the newest `limit` + 1 are kept. `where` gives the
    manifest line of (source, document).
    """

    def __init__(self, workdir: Path, limit: int, where: Callable[[int, int], str]) -> None:
        self._folder, self._limit, self._where = workdir / "nonfinite", limit, where
        self.count = 0
        self.exceeded = False
        self._in_a_row = 0

    def note(self, step: int, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a step's numbers; `nonfinite` of them is 0 where all was well. `batch` has this host's rows."""
        if not numbers["nonfinite"]:
            self._in_a_row = 0
            return
        self.count += 1
        self._in_a_row += 1
        # For good: one more step is under way when this is seen, and it may be finite.
        self.exceeded |= self._in_a_row >= self._limit
        self._keep(self._folder / f"step_{step}", numbers, batch)

    def sentence(self) -> str:
        """Why the run ended."""
        return (
            f"loss or gradient was not finite in {self._limit} steps in a row (train.nonfinite_limit); "
            f"their batches are in {self._folder}"
        )

    def _keep(self, folder: Path, numbers: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"host_{jax.process_index()}"
        np.savez(folder / f"{name}.npz", **batch)
        pairs = np.stack([batch["source_ids"], batch["document_ids"]], -1)[batch["segment_ids"] > 0]
        documents = [self._where(*pair) for pair in np.unique(pairs, axis=0).tolist()]
        told = {key: repr(value) for key, value in numbers.items()}
        (folder / f"{name}.json").write_text(json.dumps({"numbers": told, "documents": documents}, indent=1))
        if is_process_zero():
            there = sorted(self._folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
            for old in there[: -self._limit - 1]:
                shutil.rmtree(old)
