"""A job: independent units of work, each done once, whatever kills the program in between.

    OUT/NAME-00003.array_record    what unit 3 wrote, and has there only when it is whole
    OUT/.units/NAME-00003.json     its fingerprint, its files with sizes and SHA-256, its summary: written last
    OUT/.partial/NAME-00003-…/     what it is writing now

A unit whose mark in `.units` carries its fingerprint and whose files are there is not done again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import take_lock, write_json


@dataclass(frozen=True)
class Unit:
    """One piece of a job. Picklable.

    `name` is unique in the job and begins the names of its files; `fingerprint` changes with anything that decides what
    they hold; `size` weighs it in the progress (bytes, documents: any number that grows with the work).
    """

    name: str
    fingerprint: str
    content: Any
    size: int = 1


# Writes files (or a folder of them, named for the unit) into the folder it is given, and returns a JSON-ready summary.
# Called anywhere, perhaps twice.
Work = Callable[[Unit, Path], dict]


@dataclass(frozen=True)
class Job:
    """What is done to which units, and where. `title` begins the lines of its progress; `work` is picklable."""

    title: str
    units: Sequence[Unit]
    work: Work
    out: Path

    def summary(self, unit: Unit) -> dict | None:
        """Returns what `unit` returned when it was done, or None when it has to be done (again)."""
        # The mark vouches for the files by their sizes: digests would read all of a data set at every start.
        mark = read_mark(self._mark(unit))
        if not mark or mark["fingerprint"] != unit.fingerprint:
            return None
        try:
            whole = all((self.out / name).stat().st_size == size for name, (size, _) in mark["files"].items())
        except OSError:
            return None
        return mark["summary"] if whole else None

    def result(self, unit: Unit) -> dict:
        """Returns the summary of a unit that is done. Raises ConfigError when it is not."""
        summary = self.summary(unit)
        if summary is None:
            raise ConfigError(f"{self.title}: what {unit.name} wrote in {self.out} is gone")
        return summary

    def run_unit(self, unit: Unit) -> dict:
        """Does one unit and puts its files in place; returns its summary.

        The order is what makes a kill at any moment harmless: files first, the mark that vouches for them last.
        """
        partial = self.out / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        # A folder of its own: an engine may have given the same unit to two workers.
        scratch = Path(tempfile.mkdtemp(prefix=f"{unit.name}-", dir=partial))
        try:
            summary = self.work(unit, scratch)
            # Digests are taken before the files move: what the mark says is what the work wrote.
            files = {}
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[path.relative_to(scratch).as_posix()] = [path.stat().st_size, digest]
            # What an earlier unit of this name left goes first, so that no mark ever covers files of two builds.
            earlier = read_mark(self._mark(unit))
            if earlier and earlier["fingerprint"] != unit.fingerprint:
                remove_unit(self._mark(unit))
            for name in files:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / name, self.out / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        mark = {"fingerprint": unit.fingerprint, "files": files, "summary": summary}
        write_json(self._mark(unit), mark)
        return summary

    def files(self) -> dict[str, tuple[int, str]]:
        """Returns size and SHA-256 of every file that the units wrote, by name. Every unit must be done."""
        marks = (read_mark(self._mark(unit)) or {"files": {}} for unit in self.units)
        return {name: (size, digest) for mark in marks for name, (size, digest) in mark["files"].items()}

    def written(self) -> list[str]:
        """Lists all that the units wrote, their marks last. Every unit must be done."""
        return [*self.files(), *(self._mark(unit).relative_to(self.out).as_posix() for unit in self.units)]

    def _mark(self, unit: Unit) -> Path:
        return self.out / ".units" / f"{unit.name}.json"


Outcomes = Generator[tuple[Unit, dict | Exception], None, None]
# Does the units it is given, in any order and anywhere; yields each with its summary, or with the error it raised.
Runner = Callable[[Job, Sequence[Unit]], Outcomes]


def run_job(job: Job, runner: Runner, report: Callable[[str], None] = print) -> list[dict]:
    """Does what remains of a job.

    Args:
        job: the units, the work on one of them, and the folder that their files go to.
        runner: does the units that are not done yet, in any order, perhaps on other machines.
        report: takes the lines of progress.

    Returns:
        The summaries of all units, in their order, also of those that an earlier run did.

    Raises:
        StorageError: storage refused what a unit needs.
        ConfigError: naming the first unit that failed, when any did. A unit that fails stops no other: what was done
            stays done, and the same command does the rest.
    """
    names = {unit.name for unit in job.units}
    if len(names) != len(job.units):
        raise ConfigError(f"{job.title}: two units of work have the same name")
    failed: list[tuple[Unit, Exception]] = []
    # The lock is of these units, not of the folder: other hosts may do other units in it.
    same = hashlib.sha256("\n".join(unit.name for unit in job.units).encode()).hexdigest()[:12]
    with folder_lock(job.out, same, job.title):
        _clear_scratch(job)
        # What an earlier run finished is kept: its marks are read, its work is not repeated.
        known = ((unit.name, job.summary(unit)) for unit in job.units)
        summaries = {name: summary for name, summary in known if summary is not None}
        remaining = [unit for unit in job.units if unit.name not in summaries]
        progress = JobProgress(job, remaining, report)
        # Closing the generator ends the runner's processes, also when this loop is left by Ctrl-C.
        with closing(runner(job, remaining)) as outcomes:
            for unit, outcome in outcomes:
                if isinstance(outcome, Exception):
                    failed.append((unit, outcome))
                else:
                    summaries[unit.name] = outcome
                progress.done(unit, outcome)
        _clear_scratch(job)
    if failed:
        # Units that storage refused say nothing of the others; the same command does them another time.
        unit, error = next((each for each in failed if isinstance(each[1], StorageError)), failed[0])
        if isinstance(error, StorageError):
            raise StorageError(f"{job.title}: {error}") from error
        raise ConfigError(f"{job.title}: {len(failed)} of {len(job.units)} shards failed, first {unit.name}: {error}")
    return [summaries[unit.name] for unit in job.units]


def refuse_foreign(out: Path, name: str) -> None:
    """Raises ConfigError when `out` is a file, or holds anything and was never held under `name`."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file")
    # `.units` alone is what a program leaves that was killed before it held anything.
    entries = {entry.name for entry in out.iterdir()} - {".units"} if out.exists() else set()
    if entries and not _lock(out, name).exists():
        entry = min(entries, key=lambda entry: (entry.startswith("."), entry))
        raise ConfigError(
            f"--out {out} is not empty and holds {entry!r}, which this program did not write: "
            "name a new or empty folder; nothing was changed"
        )


@contextmanager
def folder_lock(out: Path, name: str, title: str) -> Iterator[None]:
    """Keeps other programs from doing the same in the folder `out`; `name` says what is the same.

    Raises ConfigError, which `title` begins, while another one does it.
    """
    (out / ".units").mkdir(parents=True, exist_ok=True)
    lock = take_lock(_lock(out, name), f"{title}: another program is at work in {out}; nothing was changed")
    try:
        yield
    finally:
        lock.release()


def _lock(out: Path, name: str) -> Path:
    return out / ".units" / f"{name}.lock"


def _clear_scratch(job: Job) -> None:
    """Removes what programs and processes that were killed were writing for this job's units."""
    names = {unit.name for unit in job.units}
    for folder in (job.out / ".partial").glob("*"):
        if folder.name.rpartition("-")[0] in names:
            shutil.rmtree(folder, ignore_errors=True)


def read_mark(path: Path) -> dict | None:
    """Reads a unit's mark: "fingerprint", "files" (name: size and SHA-256), "summary". None where there is none."""
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
        return mark if {"fingerprint", "files", "summary"} <= mark.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def remove_unit(mark: Path) -> None:
    """Removes what a unit wrote: its mark first, so that what is left of its files is never taken for whole."""
    files = (read_mark(mark) or {"files": {}})["files"]
    mark.unlink(missing_ok=True)
    for name in files:
        (mark.parents[1] / name).unlink(missing_ok=True)


def describe_error(error: Exception) -> str:
    """Returns one sentence for what a unit raised."""
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


INTERVAL = 5.0  # seconds between two lines


class JobProgress:
    """Reports a job's progress, at most every `INTERVAL` seconds, and its end."""

    def __init__(self, job: Job, remaining: Sequence[Unit], report: Callable[[str], None]):
        self._title, self._report = job.title, report
        self._units, self._kept, self._done = len(job.units), len(job.units) - len(remaining), 0
        self._size, self._size_done = sum(unit.size for unit in remaining), 0
        self._start = self._last = time.monotonic()
        if self._kept:
            report(f"{self._title}: {self._kept} of {self._units} shards are done already")

    def done(self, unit: Unit, outcome: dict | Exception) -> None:
        """Counts a unit; a failed one is reported at once."""
        now = time.monotonic()
        self._done += 1
        self._size_done += unit.size
        if isinstance(outcome, Exception):
            self._report(f"{self._title}: shard {unit.name} failed: {outcome}")
        finished = self._kept + self._done
        if now - self._last >= INTERVAL or finished == self._units:
            self._last = now
            # The time that is left, by the sizes of the units: few large ones may come last.
            spent = now - self._start
            left = spent * (self._size - self._size_done) / max(self._size_done, 1)
            times = f"{_span(spent)} so far, about {_span(left)} left" if left else f"{_span(spent)} in all"
            self._report(f"{self._title}: {finished} of {self._units} shards, {times}")


def _span(seconds: float) -> str:
    """Writes a time as 0:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
