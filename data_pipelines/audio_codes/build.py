"""Builds a store of audio codes for mixtures: what is there stays, what is missing is tokenized, whatever is killed.

    1. list      every window of audio of the mixtures, by ranges of documents (`windows.py`)
    2. plan      those that the store lacks, in parts of equal size: one unit of work a part
    3. tokenize  each unit: decode and mel in worker processes, codes on the devices, one file
    4. publish   the index and `meta.json`, from when on readers see the new codes

Steps 1 and 3 are jobs whose units hosts share out; each host works alone, on its own devices. Started again after a
kill, both go on with the units that are left, and the store ends with the same files.
"""

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float, Int32, Shaped

from baichuan_omni_jax.config.architecture import AudioConfig
from baichuan_omni_jax.storage import may_pass, patiently, take_lock
from data_pipelines.audio_codes.store import (
    ENTRY,
    REFERENCE,
    UNUSED,
    CodeStore,
    open_table,
    part_name,
    read_meta,
    save_table,
)
from data_pipelines.audio_codes.windows import MelReader, clip_sources, listed, listing_job, mixture_key
from data_pipelines.audio_codes.writer import PART_FRAMES, create_store, part_bounds, publish, starts_of, write_part
from data_pipelines.datasets.buckets import download, exchange, remove_marks, shared_path, upload
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, run_job
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.datasets.sources import check_unprepared
from data_pipelines.errors import SampleError
from data_pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)
T = TypeVar("T")
WORTH_WORKERS = 2000  # documents or windows of audio that are read sooner than worker processes start
NAMED = 20  # failures that the log names
# (row, log-mel (mels, frames)) of any number of windows to (row, codes (g, levels)), in any order.
Encode = Callable[[Iterable[tuple[int, Float[np.ndarray, "mels f"]]]], Iterator[tuple[int, Int32[np.ndarray, "g q"]]]]


@dataclass(frozen=True)
class CodeEncoder:
    """The audio tokenizer as this package knows it: what it is, and what it does."""

    fingerprint: str
    encode: Encode


@runtime_checkable
class HostCall(Protocol):
    """Does work on this host in step with the others; returns the host's own result."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def _at_once(work: Callable[[], T], /) -> T:
    return work()


@dataclass(frozen=True)
class Hosts:
    """The processes that build a store together: how many, which one this is, and how they wait for each other.

    `process_zero_first(work)` does `work` on host 0 and then on the others, `on_all_hosts(work)` on all at once. Both
    return the host's own result when all have one. `exchange(folder, names)` gives every host what all have written,
    where they share no disk.
    """

    count: int = 1
    host: int = 0
    process_zero_first: HostCall = _at_once
    on_all_hosts: HostCall = _at_once
    exchange: Callable[[Path, Sequence[str]], object] = lambda folder, names: None


SINGLE_HOST = Hosts()


@dataclass(frozen=True)
class CodeBuildOptions:
    """How a store is built. Nothing here changes what it holds, but for `part_frames` of a new one."""

    workers: int = 0
    """Processes that decode and, without a `runner`, list; 0: this one."""
    runner: Runner | None = None
    """What lists instead, as Apache Beam."""
    part_frames: int = PART_FRAMES
    """Code frames of one file of a new store, a multiple of `writer.CHUNK_FRAMES`."""
    report: Callable[[str], None] = print
    """Takes the lines of progress."""


def store_path(pipeline: Pipeline, tokenizer: CodeEncoder) -> Path:
    """Returns where the codes of a data root and a tokenizer are kept."""
    return pipeline.cache / f"codes-{tokenizer.fingerprint[:12]}"


def covers(path: Path | epath.Path, pipelines: Sequence[Pipeline]) -> bool:
    """Returns whether the store at `path` was built for these mixtures. Reads no medium: files that changed go
    unnoticed.
    """
    try:
        known = read_meta(path)["mixtures"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError) as error:
        if may_pass(error):
            raise
        return True  # something is there: opening it raises what is wrong
    return all(mixture_key(pipeline) in known for pipeline in pipelines)


def open_or_build(
    path: Path,
    pipelines: Sequence[Pipeline],
    tokenizer: CodeEncoder,
    options: CodeBuildOptions,
    hosts: Hosts = SINGLE_HOST,
    relist: bool = False,
) -> CodeStore:
    """Opens the store at `path` with the codes of all audio of `pipelines`; builds what is missing.

    A clip that cannot be decoded is named in the log and left out; its documents are then counted as `no_codes`.

    Args:
        path: the store's folder; need not exist.
        pipelines: the mixtures whose audio is to have codes; all have the audio settings of the first.
        tokenizer: makes the codes. Its fingerprint is the store's.
        options: processes, runner and progress.
        hosts: those that build together; each does its share of the units on its own devices.
        relist: goes through the documents in any case, so that files that changed get codes.

    Returns:
        The store, on every host.

    Raises:
        ConfigError: when the store is another tokenizer's or damaged, or when a unit of work failed.
    """
    if not relist and covers(path, pipelines):
        return CodeStore(path, tokenizer.fingerprint)
    if not relist:
        sources = [index.source for pipeline in pipelines for index in pipeline.indexes]
        check_unprepared(pipelines[0].config, sources, "audio codes")
    audio = pipelines[0].omni.audio
    with _exclusive(path, hosts):
        # Host 0 makes the folder; the others find it made.
        store = hosts.process_zero_first(lambda: _open_or_create(path, audio, tokenizer, options))
        if not relist and covers(path, pipelines):  # another run just did it
            return store
        # 1. List. The folder is named for the index that it is compared with: a listing is used up by publishing.
        listing = listing_job(pipelines, path / f".listing-{store.meta['index'].removesuffix('.npy')}")
        documents = sum(unit.size for unit in listing.units)
        runner = options.runner or LocalRunner(options.workers if documents > WORTH_WORKERS else 0)
        _share_out(listing, runner, hosts, options.report)
        # 2. Plan: one table, the same for all hosts, so that parts are numbered alike everywhere.
        plan = hosts.process_zero_first(lambda: _make_plan(listing, store))
        # 3. Tokenize: units run in this process, which has the devices; worker processes decode ahead of it.
        with MelReader(clip_sources(pipelines), audio, options.workers if len(plan) > WORTH_WORKERS else 0) as mels:
            work = TokenizePart(plan, tokenizer, mels, audio.levels, store.meta["part_frames"])
            job = Job("tokenizing audio", _units(plan, store, tokenizer), work, path / "frames")
            _share_out(job, LocalRunner(0), hosts, options.report)
        # 4. Publish: readers see nothing of all this before.
        return hosts.process_zero_first(lambda: _publish(path, job, plan, pipelines, listing.out))


def open_or_build_shared(
    pipelines: Sequence[Pipeline],
    tokenizer: CodeEncoder,
    options: CodeBuildOptions,
    hosts: Hosts = SINGLE_HOST,
    relist: bool = False,
) -> CodeStore:
    """Opens or builds the store of a data root, which may be a URL; arguments and errors are those of `open_or_build`.

    Of a URL it is built on the hosts' disks, copied to the bucket, and read from there.
    """
    path, config = store_path(pipelines[0], tokenizer), pipelines[0].config
    remote = shared_path(config, path)
    if remote is None:
        return open_or_build(path, pipelines, tokenizer, options, hosts, relist)
    if hosts.count > 1:
        hosts = replace(hosts, exchange=partial(exchange, path, remote, hosts.on_all_hosts, config.patience))
    covered = patiently(lambda: covers(remote, pipelines), f"reading {remote}", config.patience)
    if relist or not covered:
        # What the bucket has is added to: its parts stay as they are.
        if not path.exists() and patiently((remote / "meta.json").exists, f"looking for {remote}", config.patience):
            download(remote, path, config.patience)
        open_or_build(path, pipelines, tokenizer, options, hosts, relist)

        def share() -> None:
            upload(path, remote, "meta.json", config.patience)
            remove_marks(remote, config.patience)

        hosts.on_all_hosts(lambda: share() if hosts.host == 0 else None)
        shutil.rmtree(path)
    return CodeStore(remote, tokenizer.fingerprint, config.patience, path.with_name(f"{path.name}.index"))


@contextmanager
def _exclusive(path: Path, hosts: Hosts) -> Iterator[None]:
    """Keeps other runs of this machine out until this one is through."""
    path.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path / ".lock", "", wait=True) if hosts.host == 0 else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _open_or_create(path: Path, audio: AudioConfig, tokenizer: CodeEncoder, options: CodeBuildOptions) -> CodeStore:
    if not (path / "meta.json").exists():
        create_store(
            path,
            fingerprint=tokenizer.fingerprint,
            codebook_sizes=audio.codebook_sizes,
            window_rule={"seconds": audio.max_audio_seconds, "overlap": audio.split_overlap},
            part_frames=options.part_frames,
        )
    return CodeStore(path, tokenizer.fingerprint)


def _share_out(job: Job, runner: Runner, hosts: Hosts, report: Callable[[str], None]) -> None:
    """Shares the units out among the hosts; returns when all are done, and every host has their files."""
    mine = replace(job, units=job.units[hosts.host :: hosts.count])
    hosts.on_all_hosts(lambda: run_job(mine, runner, report) if mine.units else None)
    hosts.exchange(job.out, mine.written())


def _make_plan(listing: Job, store: CodeStore) -> Shaped[np.ndarray, " n"]:
    """Opens the windows to tokenize, memory-mapped; the first host writes them."""
    key = hashlib.sha256("".join(unit.fingerprint for unit in listing.units).encode()).hexdigest()[:16]
    path = listing.out / f"plan-{key}.npy"
    if not path.exists():
        save_table(path, listed(listing, store.index))
    return open_table(path, REFERENCE)


def _units(plan: Shaped[np.ndarray, " n"], store: CodeStore, tokenizer: CodeEncoder) -> list[Unit]:
    """Returns one unit for each part that the plan fills, numbered after those that the store has."""
    units, part_frames = [], store.meta["part_frames"]
    for number, (first, last) in enumerate(part_bounds(plan["length"], part_frames), start=len(store.meta["parts"])):
        digest = hashlib.sha256(f"{tokenizer.fingerprint} {part_frames} {number}".encode() + plan[first:last].tobytes())
        units.append(Unit(part_name(number), digest.hexdigest(), (number, first, last), last - first))
    return units


@dataclass(frozen=True)
class TokenizePart:
    """The work of the tokenizing job: rows of the plan to one part of the store."""

    plan: Shaped[np.ndarray, " n"]
    tokenizer: CodeEncoder
    mels: MelReader
    levels: int
    part_frames: int

    def __call__(self, unit: Unit, folder: Path) -> dict:
        """Writes the part; the summary has the rows without codes and why."""
        number, first, last = unit.content
        table = self.plan[first:last]
        # Windows have their places before they have codes: the encoder answers in any order. What stays `UNUSED` is the
        # frames of windows that failed, which the index will not name.
        starts, failed = starts_of(table["length"]), {}
        frames = np.full((int(table["length"].sum()), self.levels), UNUSED, np.int32)
        for row, codes in self.tokenizer.encode(self._decoded(table, failed)):
            if len(codes) == table["length"][row]:
                frames[starts[row] : starts[row] + len(codes)] = codes
            else:
                failed[row] = ("changed", f"it gives {len(codes)} code frames, measured {table['length'][row]}")
        write_part(folder, number, frames, self.part_frames)
        return {"failed": {str(first + row): why for row, why in sorted(failed.items())}}

    def _decoded(self, table: np.ndarray, failed: dict) -> Iterator[tuple[int, np.ndarray]]:
        for row, outcome in self.mels(table):
            if isinstance(outcome, SampleError):
                failed[row] = (outcome.cause, str(outcome))
            else:
                yield row, outcome


def _publish(
    path: Path, job: Job, plan: Shaped[np.ndarray, " n"], pipelines: Sequence[Pipeline], listing: Path
) -> CodeStore:
    """Adds what the job wrote to the store. On a second host it finds that done."""
    # Any host may come second here, and a run that was killed after publishing comes here again: nothing is added
    # twice.
    meta = read_meta(path)
    mixtures = sorted({*meta["mixtures"], *map(mixture_key, pipelines)})
    if mixtures != meta["mixtures"] or any(unit.name not in meta["parts"] for unit in job.units):
        failed = _failures(job, plan, pipelines)
        entries = _entries(job, plan, meta["part_frames"], failed)
        index = np.concatenate([open_table(path / meta["index"], ENTRY), entries])
        parts = {name: tuple(facts) for name, facts in meta["parts"].items()} | job.files()
        publish(path, meta, index, parts, mixtures)
    # A listing that was used up: files may change before the next one.
    for done in (listing, job.out / ".units", job.out / ".partial"):
        shutil.rmtree(done, ignore_errors=True)
    return CodeStore(path)


def _failures(job: Job, plan: Shaped[np.ndarray, " n"], pipelines: Sequence[Pipeline]) -> list[int]:
    """Returns the rows of the plan without codes; logs the first of them and counts all."""
    sources, failed, causes = clip_sources(pipelines), [], Counter()
    for unit in job.units:
        for row, (cause, message) in job.result(unit)["failed"].items():
            failed.append(int(row))
            causes[cause] += 1
            if len(failed) <= NAMED:
                source, document = plan[int(row)].item()[4:]
                where = sources[source].index.location(document)
                log.warning("no codes for a window of audio of %s (%s): %s", where, cause, message)
    if len(failed) > NAMED:
        log.warning("no codes for %d windows of audio: %s", len(failed), dict(causes))
    return failed


def _entries(
    job: Job, plan: Shaped[np.ndarray, " n"], part_frames: int, failed: Sequence[int]
) -> Shaped[np.ndarray, " k"]:
    """Returns the index of what the job wrote: its plan with the place of each window, but those without codes."""
    entries, written = np.zeros(len(plan), ENTRY), np.ones(len(plan), bool)
    for name in ("high", "low", "window", "length"):
        entries[name] = plan[name]
    for unit in job.units:
        number, first, last = unit.content
        entries["start"][first:last] = number * part_frames + starts_of(plan["length"][first:last])
    written[list(failed)] = False
    return entries[written]
