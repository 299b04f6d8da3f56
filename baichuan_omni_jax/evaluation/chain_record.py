"""What a chain of runs leaves in its folder, as it is written and as it is read.

    FOLDER/chain.json              the stages in order, machine and versions, seconds that each stage took
    FOLDER/NAME/metrics.jsonl      of each stage, as training writes it
    FOLDER/NAME/abilities.json     where it measured any

Reading never fails: a run may be at work, half killed, or of an earlier version. What cannot be read is not there.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from baichuan_omni_jax.storage import write_json

CHAIN, METRICS, ABILITIES, RUN_CONFIG = "chain.json", "metrics.jsonl", "abilities.json", "run_config.json"
# What a stage writes, and what the chain's own folder has beside.
_NUMBERS = {METRICS, ABILITIES, RUN_CONFIG, "parent.json", "goodput.json"}
_OWN = {CHAIN, "log.txt", "data.log", "retention.md", "retention.json", "report.html"}
_LARGEST = 1e100
EVALUATION = "evaluation"  # the folder of what the finished model was asked
_PACKAGES = ("baichuan_omni_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_stage_file(name: str) -> bool:
    """Whether a file of a chain's folder, by its path there, has numbers of a stage.

    >>> is_stage_file("sft/metrics.jsonl"), is_stage_file("sft/checkpoints/5/metrics.jsonl")
    (True, False)
    """
    return name.count("/") < 2 and name.rpartition("/")[2] in _NUMBERS


def is_chain_file(name: str) -> bool:
    """Whether a file of a chain's folder is a small one: of a stage's numbers, the chain's own or the evaluation's."""
    own = name.count("/") < 2 and name.rpartition("/")[2] in _OWN
    return own or is_stage_file(name) or name.startswith(f"{EVALUATION}/")


@dataclass(frozen=True)
class StageRecord:
    """One stage of a chain: its name, the steps it is to have, and the seconds it has taken in all its starts."""

    name: str
    steps: int
    wall: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class ChainRecord:
    """The stages of a folder in order, and what they ran on."""

    stages: Sequence[StageRecord] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""


class ChainWriter:
    """Keeps `chain.json` of a folder: what is run, and the seconds of each stage over all starts of the chain."""

    def __init__(self, folder: Path, stages: Mapping[str, int], recipe: str = "") -> None:
        """`stages`: steps by name, in order; `recipe`: the name of the table that they come from."""
        before = {stage.name: stage for stage in read_chain(folder).stages}
        self._path, self._stages, self._recipe = folder / CHAIN, stages, recipe
        self._times = {name: (before[name].wall, before[name].cpu) for name in stages if name in before}
        self._written = 0.0
        # The stage at work: its name, when it began, and the CPU seconds of child processes until then.
        self._running: tuple[str, float, float] | None = None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a stage's seconds, those of its processes as CPU seconds; writes the file."""
        self._running = name, time.monotonic(), _children_cpu()
        try:
            yield
        finally:
            self._times, self._running = self._now(), None
            self._write(self._times)

    def note(self, every: float = 10.0) -> None:
        """Writes what the stage at work has taken up to now, every so many seconds: a killed chain keeps it."""
        if time.monotonic() - self._written >= every:
            self._write(self._now())

    def _write(self, times: Mapping[str, tuple[float, float]]) -> None:
        stages = [
            {"name": name, "steps": steps, "wall_s": round(times[name][0], 1), "cpu_s": round(times[name][1], 1)}
            if name in times
            else {"name": name, "steps": steps}
            for name, steps in self._stages.items()
        ]
        facts = {"recipe": self._recipe, "stages": stages, "machine": machine_facts(), "versions": package_versions()}
        write_json(self._path, facts)
        self._written = time.monotonic()

    def _now(self) -> dict[str, tuple[float, float]]:
        if self._running is None:
            return self._times
        name, began, cpu = self._running
        known = self._times.get(name, (0.0, 0.0))
        return self._times | {name: (known[0] + time.monotonic() - began, known[1] + _children_cpu() - cpu)}


def _children_cpu() -> float:
    """CPU seconds of all processes that have ended and were waited for, with theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine_facts() -> dict[str, str]:
    """Tells what this machine is, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {"system": f"{platform.system()} {platform.release()}", "processor": _processor(), "cores": str(cores)}
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return facts
    return facts | {"memory": f"{memory:.0f} GiB"}


def _processor() -> str:
    # Linux tells the name of the product here; elsewhere Python knows the family at least.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_chain(folder: Path) -> ChainRecord:
    """Reads what a folder says of its chain; where it says nothing, the runs in it by when they began."""
    found = _read_object(folder / CHAIN)
    entries = found.get("stages")
    stages = [stage for entry in entries if (stage := _stage(entry))] if isinstance(entries, list) else []
    return ChainRecord(
        stages or _runs_in(folder),
        _words(found.get("machine")),
        _words(found.get("versions")),
        str(found.get("recipe") or ""),
    )


def _stage(entry: Any) -> StageRecord | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    # A name is one folder: nothing outside is ever read, and it is one that a file system can have.
    name = entry["name"]
    if Path(name).name != name or name == ".." or "\0" in name or name != name.encode("utf-8", "replace").decode():
        return None
    steps, wall, cpu = (number(entry.get(key)) or 0.0 for key in ("steps", "wall_s", "cpu_s"))
    return StageRecord(name, int(steps), wall, cpu)


def _runs_in(folder: Path) -> list[StageRecord]:
    """Lists the runs below a folder, or the folder itself as one run."""
    homes = [folder] if (folder / RUN_CONFIG).is_file() else [path.parent for path in folder.glob(f"*/{RUN_CONFIG}")]
    # `parent.json` is written once, when a run begins; the configuration with every start.
    began = lambda home: next(path.stat().st_mtime for n in ("parent.json", RUN_CONFIG) if (path := home / n).exists())  # noqa: E731
    runs = []
    for home in sorted(homes, key=began):
        train = _read_object(home / RUN_CONFIG).get("train")
        steps = number(train.get("steps")) if isinstance(train, dict) else None
        wall = number(_read_object(home / "goodput.json").get("elapsed_s")) or 0.0
        runs.append(StageRecord("" if home == folder else home.name, int(steps or 0), wall))
    return runs


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(found: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """Returns a finite number as float; None for anything else, true and false too.

    Beyond 1e100, which no run measures, sums and percentages would be infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _LARGEST else None


class MetricsFile:
    """`metrics.jsonl` of a run, read as it grows.

    A run that goes on rewrites the file without the steps that it will repeat: then all is read anew.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rest, self._at, self._file = path, b"", 0, (0, 0)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the records that are new since the last call, and whether they begin anew."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                anew = (status.st_dev, status.st_ino) != self._file or status.st_size < self._at
                if anew:
                    self._rest, self._at, self._file = b"", 0, (status.st_dev, status.st_ino)
                file.seek(self._at)
                data = file.read()
        except OSError:
            return [], False
        self._at += len(data)
        # What follows the last line end is a line that is still being written.
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [record for line in lines if (record := _record(line)) is not None], anew


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all records of a `metrics.jsonl`."""
    return MetricsFile(path).read()[0]


def _record(line: bytes) -> dict[str, Any] | None:
    """Parses a line; None for one that is cut, damaged, or has no step."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**53 else None


def ability_scores(record: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Finds the abilities in a record: name -> (`accuracy` or `cer`, the score)."""
    found = {}
    for key, value in record.items():
        parts = key.split("/")
        is_score = len(parts) >= 3 and parts[0] == "ability" and parts[-1] in ("accuracy", "cer")
        if is_score and (score := number(value)) is not None:
            found["/".join(parts[1:-1])] = (parts[-1], score)
    return found


@dataclass
class Score:
    """One ability as it was measured last: its score by its measure, and what stands beside it, where it is known."""

    measure: str  # `accuracy` or `cer`
    score: float
    chance: float | None = None
    items: float | None = None
    low: float | None = None
    high: float | None = None
    media_gain: float | None = None


def read_scores(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Finds what a run was last measured to be able to do: in its metrics, and with more beside it in `abilities.json`.

    Args:
        folder: the run's workdir.
        records: what `read_metrics` gives of it.
    """
    found: dict[str, Score] = {}
    for record in records:
        for name, (measure, score) in ability_scores(record).items():
            beside = {key: number(record.get(f"ability/{name}/{key}")) for key in ("chance", "items")}
            found[name] = Score(measure, score, **beside)
        for key in record:
            parts = key.split("/")
            if len(parts) == 4 and parts[0] == "eval" and parts[3] == "media_gain" and parts[2] in found:
                found[parts[2]].media_gain = number(record[key])
    steps = _read_object(folder / ABILITIES).get("steps")
    # More digits than a step has are no number that Python reads.
    if isinstance(steps, dict) and (known := [step for step in steps if step.isdecimal() and len(step) < 18]):
        last = steps[max(known, key=int)]
        for name, entry in last.items() if isinstance(last, dict) else ():
            if isinstance(entry, dict) and (score := _score(entry)) is not None:
                found[name] = score
    return found


def _score(entry: Mapping[str, Any]) -> Score | None:
    measure = "accuracy" if "accuracy" in entry else "cer"
    score = number(entry.get(measure))
    beside = {key: number(entry.get(key)) for key in ("chance", "items", "low", "high", "media_gain")}
    return None if score is None else Score(measure, score, **beside)
