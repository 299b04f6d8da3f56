"""Goodput: the share of a run's wall time in which its devices worked on steps that are still part of it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

# Near enough to the start of the process: importing this package is one of the first things that a command does.
_BEGAN = time.monotonic()


class Goodput:
    """Adds up over all starts of a run.

    Wall time is that of every start, from its import of this module to its last reported step; what passed between
    two starts does not count. It stands in `WORKDIR/goodput.json`. Productive time is the `productive_s` of every row
    in metrics.jsonl, where a step that was lost with a killed process and computed again is only once.
    """

    def __init__(self, workdir: Path, rows: Sequence[dict]) -> None:
        """`rows` are those that metrics.jsonl holds already."""
        self._path = workdir / "goodput.json"
        self._productive = sum(row.get("productive_s", 0.0) for row in rows)
        self._before = _read(self._path)

    def note(self, productive: float) -> float:
        """Adds a step's productive seconds; returns the run's goodput up to now, 0 to 1."""
        self._productive += productive
        elapsed = self._before + time.monotonic() - _BEGAN
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"elapsed_s": elapsed}))
        partial.replace(self._path)
        return self._productive / elapsed


def _read(path: Path) -> float:
    """Wall seconds of earlier starts; 0 where the file is not there or cannot be read: it is only a statistic."""
    try:
        return float(json.loads(path.read_text())["elapsed_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
