"""A job: independent units of work, each done once, whatever kills the program in between.

    OUT/NAME-00003.array_record    what unit 3 wrote, and has there only when it is whole
    OUT/.units/NAME-00003.json     its fingerprint, its files with sizes and SHA-256, its summary: written last
    OUT/.partial/NAME-00003-…/     what it is writing now

A unit whose mark in `.units` carries its fingerprint and whose files are there is not done again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.config import ConfigError


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
        """What `unit` returned when it was done, or None when it has to be done (again)."""
        try:
            mark = json.loads(self._mark(unit).read_text(encoding="utf-8"))
            whole = mark["fingerprint"] == unit.fingerprint and all(
                (self.out / name).stat().st_size == size for name, (size, _) in mark["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mark["summary"] if whole else None

    def do(self, unit: Unit) -> dict:
        """Does one unit and puts its files in place; returns its summary."""
        partial = self.out / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        # A folder of its own: an engine may have given the same unit to two workers.
        scratch = Path(tempfile.mkdtemp(prefix=f"{unit.name}-", dir=partial))
        try:
            summary = self.work(unit, scratch)
            files = {}
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                files[path.relative_to(scratch).as_posix()] = [path.stat().st_size, _sha256(path)]
            for name in files:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / name, self.out / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        mark = {"fingerprint": unit.fingerprint, "files": files, "summary": summary}
        write_json(self._mark(unit), mark)
        return summary

    def files(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of every file that the units wrote, by name. Every unit must be done."""
        marks = (json.loads(self._mark(unit).read_text(encoding="utf-8")) for unit in self.units)
        return {name: (size, digest) for mark in marks for name, (size, digest) in mark["files"].items()}

    def _mark(self, unit: Unit) -> Path:
        return self.out / ".units" / f"{unit.name}.json"


Outcomes = Generator[tuple[Unit, dict | Exception], None, None]
# Does the units it is given, in any order and anywhere; yields each with its summary, or with the error it raised.
Runner = Callable[[Job, Sequence[Unit]], Outcomes]


def run_job(job: Job, runner: Runner, report: Callable[[str], None] = print) -> list[dict]:
    """Does what is left of a job; returns the summaries of all its units, in their order.

    A unit that fails stops no other. Raises ConfigError, naming the first of them, when any failed: what was done stays
    done, and the same command does the rest.
    """
    from data_pipelines.jobs.progress import Progress

    names = {unit.name for unit in job.units}
    if len(names) != len(job.units):
        raise ConfigError(f"{job.title}: two units of work have the same name")
    failed: list[tuple[Unit, Exception]] = []
    with _alone(job):
        shutil.rmtree(job.out / ".partial", ignore_errors=True)  # of a program that was killed
        summaries = {unit.name: job.summary(unit) for unit in job.units}
        left = [unit for unit in job.units if summaries[unit.name] is None]
        progress = Progress(job, left, report)
        with closing(runner(job, left)) as outcomes:
            for unit, outcome in outcomes:
                if isinstance(outcome, Exception):
                    failed.append((unit, outcome))
                else:
                    summaries[unit.name] = outcome
                progress.done(unit, outcome)
        shutil.rmtree(job.out / ".partial", ignore_errors=True)
    if failed:
        unit, error = failed[0]
        raise ConfigError(f"{job.title}: {len(failed)} of {len(job.units)} shards failed, first {unit.name}: {error}")
    return [summaries[unit.name] for unit in job.units]


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Holds the job's folder, so that no other program clears away what this one is writing."""
    (job.out / ".units").mkdir(parents=True, exist_ok=True)
    with (job.out / ".units" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{job.title}: another program is at work in {job.out}; nothing was changed") from None
        yield


def write_json(path: Path, values: object) -> None:
    """Written beside its place and renamed: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
