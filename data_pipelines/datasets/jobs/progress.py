"""How far a job is: units done, documents, and the time that the rest will take."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipelines.datasets.jobs.job import Job, Unit

INTERVAL = 5.0  # seconds between two lines


class Progress:
    """Reports a job's progress, at most every `INTERVAL` seconds, and its end."""

    def __init__(self, job: "Job", left: Sequence["Unit"], report: Callable[[str], None]):
        self._title, self._report = job.title, report
        self._units, self._kept, self._done = len(job.units), len(job.units) - len(left), 0
        self._size, self._size_done = sum(unit.size for unit in left), 0
        self._start = self._last = time.monotonic()
        if self._kept:
            report(f"{self._title}: {self._kept} of {self._units} shards are done already")

    def done(self, unit: "Unit", outcome: dict | Exception) -> None:
        """Counts a unit; a failed one is reported at once."""
        now = time.monotonic()
        self._done += 1
        self._size_done += unit.size
        if isinstance(outcome, Exception):
            self._report(f"{self._title}: shard {unit.name} failed: {outcome}")
        finished = self._kept + self._done
        if now - self._last >= INTERVAL or finished == self._units:
            self._last = now
            self._report(f"{self._title}: {finished} of {self._units} shards, {self._times(now - self._start)}")

    def _times(self, spent: float) -> str:
        left = spent * (self._size - self._size_done) / max(self._size_done, 1)
        return f"{_span(spent)} so far, about {_span(left)} left" if left else f"{_span(spent)} in all"


def _span(seconds: float) -> str:
    """0:00:07 and the like."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
