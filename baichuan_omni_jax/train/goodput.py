"""Which share of a run's wall time its devices worked on steps that are still part of it, and what the rest went on.

WORKDIR/goodput.json      wall time since the first start, and how much of it lay between starts
WORKDIR/goodput.jsonl     one object an event, as ml-goodput-measurement logs them, for its calculator
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

GOODPUT, EVENTS = "goodput.json", "goodput.jsonl"
# Near enough to the start of the process: importing this package is one of the first things that a command does.
_BEGAN = time.time()
# Seconds: what is shorter is not worth a line.
_SHORT = 0.1


class Goodput:
    """Adds up, over all starts of a run, the share of its wall time in which devices worked on steps still part of it.

    Wall time goes from the first start to the last reported step, with what passed between two starts: waiting for a
    machine counts. Productive time is the `productive_s` of every line of metrics.jsonl, where a step that was lost
    with a killed process and computed again is only once.
    """

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]], name: str = "") -> None:
        """Reads what earlier starts left.

        Args:
            folder: where both files are.
            records: those that metrics.jsonl holds already.
            name: what the run is called in the events.
        """
        self._path, self._name = folder / GOODPUT, name
        self._productive = sum(_numbers({"s": record.get("productive_s")}).get("s", 0.0) for record in records)
        known = _read(self._path)
        # A file of an earlier version has no times of day: its starts count as if they had been right before this one.
        self._first = known.get("began", _BEGAN - known.get("elapsed_s", 0.0))
        self._between = known.get("between_starts_s", 0.0) + max(0.0, _BEGAN - known.get("at", _BEGAN))
        self._starts = int(known.get("starts", 0)) + 1
        self._refused = False
        self._events = open(folder / EVENTS, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self.tell(job_start_time=_BEGAN)
        self.tell(training_prep_start_time=_BEGAN)
        self.tell(training_prep_end_time=time.time())

    def note(self, productive: float) -> float:
        """Adds a step's productive seconds; returns the run's goodput up to now, 0 to 1."""
        # Replaced, not rewritten: a kill leaves the old file or the new one.
        self._productive += productive
        now = time.time()
        # The clocks of two machines may differ: no share above 1 comes of it.
        elapsed = max(now - self._first, self._productive)
        found = {"elapsed_s": elapsed, "between_starts_s": self._between, "starts": self._starts}
        partial = self._path.with_suffix(".partial")
        with self._unless_refused(self._path):
            partial.write_text(json.dumps(found | {"began": self._first, "at": now}))
            partial.replace(self._path)
        return self._productive / elapsed if elapsed else 0.0

    def step(self, number: int, began: float, waited: float) -> None:
        """Tells of a step that begins, and of the wait for its rows.

        Args:
            number: the step.
            began: when its rows were asked for (`time.time`).
            waited: seconds until they were there.
        """
        self.tell(step_count=number, step_start_time=began)
        if waited > _SHORT:
            self.tell(data_loading_start_time=began)
            self.tell(data_loading_end_time=began + waited)

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Tells of what is no step: an evaluation, a save as far as the steps wait for it."""
        began = time.time()
        yield
        if time.time() - began > _SHORT:
            kind = {"custom_badput_event_type": what}
            self.tell(custom_badput_event_start_time=began, **kind)
            self.tell(custom_badput_event_end_time=time.time(), **kind)

    def tell(self, **event: object) -> None:
        """Writes an event, flushed: a killed run leaves at most one cut line."""
        with self._unless_refused(self._events.name):
            self._events.write(json.dumps({"job_name": self._name} | event) + "\n")
            self._events.flush()

    def close(self) -> None:
        """Tells that this start has ended."""
        self.tell(job_end_time=time.time())
        with self._unless_refused(self._events.name):
            self._events.close()

    @contextmanager
    def _unless_refused(self, path: Path | str) -> Iterator[None]:
        """Warns, once, of a file that cannot be written inside: no run ends for a statistic."""
        try:
            yield
        except OSError as error:
            if not self._refused:
                log.warning("%s cannot be written: %s", path, error.strerror or error)
            self._refused = True


def _read(path: Path) -> dict[str, float]:
    """Reads what was noted last; {} where the file is not there or is no such thing: it is only a statistic."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return _numbers(found) if isinstance(found, dict) else {}


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Returns what of an object is a number that can be reckoned with: people edit these files."""
    kinds = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in kinds.items() if abs(value) < 1e15}
