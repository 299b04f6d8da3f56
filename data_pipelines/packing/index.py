"""What every document of a source takes of each budget: what mixture, shuffle and packing work on; and its building.

Measured once from headers and cached, in parallel and resumably, so that rows are planned before anything is decoded.
Documents that cannot be used are named with their cause, so that every manifest line ends up in a row or in a count.

    CACHE/NAME-KEY/            the index (columns.py), there only when it is whole
    CACHE/NAME-KEY.building/   what its units have measured so far, with jobs' marks
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.buckets import cache_folder, fetch_shared, share
from data_pipelines.datasets.jobs.job import Job, Unit, run_job
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.datasets.sources import ManifestSource, Source, check_unprepared, open_source, read_fetched
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import manifest_stem
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError, first_of_causes
from data_pipelines.media.frame_tracks import FrameSpec
from data_pipelines.packing.columns import (
    META_FILE,
    NO_PIECES,
    SKIPPED_FILE,
    Columns,
    ColumnsWriter,
    Pieces,
    make_columns,
    open_columns,
    write_columns,
)
from data_pipelines.packing.row_limits import DocumentLengths, RowLimits

_CHUNK = 1 << 20  # documents looked at together: what memory that takes does not grow with the index


@dataclass(frozen=True)
class Skipped:
    """A document that no row will hold: its manifest line, and why."""

    location: str
    cause: str
    message: str


@dataclass(frozen=True)
class Index:
    """One source's documents, `total` of them, numbered from 0. Picklable: columns go as the name of their folder."""

    name: str
    source: Source
    columns: Columns  # lengths of every document
    limits: RowLimits | None = None  # what a row holds, once that is known
    # Documents that an empty row cannot hold, ascending.
    over: Int64[np.ndarray, "o"] = field(default_factory=lambda: np.zeros(0, np.int64))
    pieces: Pieces = NO_PIECES  # what is made of these, numbered from `total` on

    @property
    def manifest(self) -> str:
        return self.source.path

    @property
    def total(self) -> int:
        return len(self.columns)

    @property
    def usable(self) -> int:
        """Documents, and pieces of documents, that rows can hold."""
        return self.total - len(self.over) + len(self.pieces)

    @property
    def documents(self) -> int:
        """Manifest lines or records, usable or not."""
        return self.total + sum(self.columns.meta.get("causes", {}).values())

    @property
    def digest(self) -> str:
        """Differs between indexes whose documents, pieces or lengths differ."""
        pieces = self.pieces
        parts = (self.over, pieces.documents, pieces.turns, pieces.max_frames, pieces.spans)
        own = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        return f"{self.columns.meta.get('digest', '')} {own[:12]}"

    def numbers(self) -> Iterator[int]:
        """Yields numbers of all usable documents and pieces, ascending."""
        # Both ascend, so that one walk leaves out what no row can hold.
        over = iter(self.over.tolist())
        gap = next(over, None)
        for number in range(self.total + len(self.pieces)):
            if number == gap:
                gap = next(over, None)
            else:
                yield number

    def document(self, number: int) -> Document:
        """Reads the document or piece `number` from its source."""
        # Pieces are numbered behind the documents: one is cut out of its document whenever it is read.
        if number >= self.total:
            piece = number - self.total
            return self.pieces.cut(piece, self.document(self.pieces.document(piece)))
        return self.source.document(int(self.columns.places[number]), int(self.columns.numbers[number]))

    @property
    def remote(self) -> bool:
        """Whether documents have to be fetched."""
        return self.source.remote

    def fetch(self, number: int) -> None:
        """Brings what the document or piece `number` is read from to this machine, where that lies in a bucket."""
        number = self.base(number)
        self.source.fetch(int(self.columns.places[number]), int(self.columns.numbers[number]))

    def location(self, number: int) -> str:
        """Returns the manifest line or the record of a document or piece."""
        number = self.base(number)
        return self.source.location(int(self.columns.places[number]), int(self.columns.numbers[number]))

    def base(self, number: int) -> int:
        """Returns the document that `number` is, or is a piece of."""
        return number if number < self.total else self.pieces.document(number - self.total)

    def lengths(self, number: int) -> Int32[np.ndarray, "budgets"]:
        """Returns what `number` takes of the budgets, in the order of `Budgets`' fields."""
        columns, place = self._columns_of(number)
        return columns.lengths[place]

    def image_patches(self, number: int) -> list[int]:
        """Returns the patches of each image and video frame of `number`, in order."""
        columns, place = self._columns_of(number)
        return columns.patches_of(place)

    def expand(self, numbers: Int64[np.ndarray, "k"]) -> list[list[DocumentLengths]]:
        """Gives documents as they are, pieces of those that are too long, or nothing (`mixture.Documents`)."""
        found = [[each] for each in _read_lengths(self.columns, numbers, 0)]
        if len(self.over):
            # Documents beyond a budget give their pieces in their place of the order.
            at = np.searchsorted(self.over, numbers).clip(max=len(self.over) - 1)
            for place in np.flatnonzero(self.over[at] == numbers).tolist():
                own = self.pieces.for_document(int(numbers[place]))
                found[place] = _read_lengths(self.pieces.columns, np.arange(own.start, own.stop), self.total)
        return found

    def document_lengths(self, number: int) -> DocumentLengths:
        """Returns the document or piece `number`."""
        return DocumentLengths(number, tuple(self.lengths(number).tolist()), self.image_patches(number))

    def within(self, budgets: Budgets, media_shards: int = 1) -> "Index":
        """Makes the same index for rows of these budgets, their patches in `media_shards` parts that hold whole images.

        Documents that an empty row cannot hold are skipped as `too_long`. No column is copied.
        """
        limits, over = RowLimits(budgets, media_shards), []
        for start in range(0, self.total, _CHUNK):
            places = np.asarray(self.columns.image_offsets[start : start + _CHUNK + 1])
            images = self.columns.image_patches[places[0] : places[-1]]
            needs = self.columns.lengths[start : start + _CHUNK]
            # Only sizes are compared: what memory this takes does not grow with the index.
            over.append(start + np.flatnonzero(limits.exceeds(needs, images, np.diff(places))))
        too_long = np.concatenate([np.zeros(0, np.int64), *over])
        return replace(self, limits=limits, over=too_long, pieces=NO_PIECES)

    @property
    def skipped(self) -> Iterator[Skipped]:
        """Every document that no row will hold: those that cannot be used, then those that are too long."""
        if self.skipped_file is not None:
            with self.skipped_file.open(encoding="utf-8") as file:
                yield from (Skipped(*json.loads(line)) for line in file)
        if self.limits is None:
            return
        for number in self.over.tolist():
            message = self.pieces.left.get(number)
            if message or not len(self.pieces.for_document(number)):
                message = message or self.limits.why_exceeds(self.lengths(number).tolist(), self.image_patches(number))
                yield Skipped(self.location(number), "too_long", message)

    @property
    def skipped_file(self) -> Path | None:
        """Names every document that cannot be used, whatever the budgets."""
        return None if self.columns.folder is None else self.columns.folder / SKIPPED_FILE

    def causes(self) -> Counter:
        """Tells how many documents were skipped for each cause."""
        causes = Counter(self.columns.meta.get("causes", {}))
        # What was cut into pieces without loss counts as used.
        causes["too_long"] = len(self.over) - self.pieces.rescued
        return +causes

    def examples(self) -> dict[str, str]:
        """Finds for each cause one of the documents that were skipped for it and the reason, as one sentence."""
        found = ((item.location, item.cause, item.message) for item in self.skipped)
        return first_of_causes(found, self.causes())

    def why_unusable(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in self.causes().most_common())
        return f"skipped {causes} of {self.manifest}" if causes else f"{self.manifest} is empty"

    def _columns_of(self, number: int) -> tuple[Columns, int]:
        return (self.columns, number) if number < self.total else (self.pieces.columns, number - self.total)


def _read_lengths(columns: Columns, places: Int64[np.ndarray, "k"], first: int) -> list[DocumentLengths]:
    """Returns documents at these places of columns; the document at 0 has the number `first`."""
    # Whole columns at once: one gather a column instead of one a document.
    needs = columns.lengths[places].tolist()
    starts, ends = columns.image_offsets[places].tolist(), columns.image_offsets[places + 1].tolist()
    return [
        DocumentLengths(first + place, tuple(need), columns.image_patches[start:end].tolist() if end > start else [])
        for place, need, start, end in zip(places.tolist(), needs, starts, ends, strict=True)
    ]


FILE_CAUSES = ("missing_file", "outside_root", "unreadable_media", "too_big_media")
FORMAT = 8  # of cached indexes: raise it when they hold something else than before
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasurePart:
    """The work on one part of a source: its columns, and what is skipped."""

    source: Source
    processor: Processor

    def __call__(self, unit: Unit, folder: Path) -> dict:
        # What cannot be measured is named in a file of its own, and has no line in the columns.
        lengths, places, numbers, causes = [], [], [], Counter()
        with (folder / f"{unit.name}.{SKIPPED_FILE}").open("w", encoding="utf-8") as skipped:
            for entry in read_fetched(self.source, unit.content):
                try:
                    if isinstance(entry.document, SampleError):
                        raise entry.document
                    lengths.append(self.processor.measure(entry.document))
                except SampleError as error:
                    causes[error.cause] += 1
                    skipped.write(json.dumps([entry.location, error.cause, str(error)]) + "\n")
                    continue
                places.append(entry.place)
                numbers.append(entry.number)
        columns = make_columns(lengths, places, numbers)
        write_columns(columns, folder, f"{unit.name}.")
        return {"documents": len(columns), "images": len(columns.image_patches), "causes": dict(causes)}


def load_index(config: DataConfig, entry: SourceConfig, processor: Processor, workers: int = 0) -> Index:
    """Loads the index of a manifest or data set from the cache, or builds it.

    It is the cached one when source and processor are those that it was built with; one that is damaged is built anew.

    Args:
        config: where cache and data lie.
        entry: the source.
        processor: measures documents.
        workers: processes that build, where there is work for more than one.

    Returns:
        The index, without budgets yet (`Index.within`).

    Raises:
        ConfigError: the source cannot be read, or holds token ids of another tokenizer.
    """
    try:
        source = open_source(config, entry)
        # Whatever changes a measure changes the name of the index.
        described = f"{FORMAT} {processor.fingerprint} {source.fingerprint} {source.media_key}"
        key = hashlib.sha256(described.encode()).hexdigest()[:16]
    except ConfigError as error:
        raise ConfigError(f"source {entry.name}: {error}") from error
    # Before anything is measured: every document of such a source would be skipped for the same reason.
    if source.tokenizer not in ("", processor.tokenizer_fingerprint):
        raise ConfigError(
            f"source {entry.name}: {entry.manifest} holds token ids of tokenizer {source.tokenizer}, not of "
            f"{processor.tokenizer_fingerprint}, the one in use: set data.tokenizer to the file it was cached with"
        )
    vision = processor.config.vision
    if source.frames and not FrameSpec.parse(source.frames).serves(vision.frames_per_second, vision.max_frames):
        taken = f"{vision.frames_per_second:g} a second, {vision.max_frames} of a video at most"
        raise ConfigError(
            f"source {entry.name}: {entry.manifest} was built with --frames {source.frames}, and the model takes "
            f"{taken}: build it anew, from the videos"
        )
    folder = cache_folder(config) / f"{Path(manifest_stem(entry.manifest)).name}-{key}"
    fetch_shared(config, folder, META_FILE)
    try:
        columns = open_columns(folder)
        _warn_of_old_causes(source, columns)
    except FileNotFoundError:
        check_unprepared(config, [source], "index")
        columns = _build(source, processor, folder, workers)
        share(config, folder, META_FILE)
    except (ValueError, OSError) as error:
        log.warning("the index %s is damaged and built anew: %s", folder, error)
        columns = _build(source, processor, folder, workers)
        share(config, folder, META_FILE)
    return Index(entry.name, source, columns)


def _warn_of_old_causes(source: Source, columns: Columns) -> None:
    """Warns of loose files that were skipped: they may have been mended since they were measured."""
    files = sum(columns.meta.get("causes", {}).get(cause, 0) for cause in FILE_CAUSES)
    if files and isinstance(source, ManifestSource):
        log.warning(
            "%s: %d skipped for files as they once were; delete %s to look again", source.path, files, columns.folder
        )


def _build(source: Source, processor: Processor, folder: Path, workers: int) -> Columns:
    units = [Unit(f"part-{place:06d}", folder.name, part, part.length) for place, part in enumerate(source.parts)]
    out = folder.with_name(f"{folder.name}.building")
    job = Job(f"index of {source.path}", units, MeasurePart(source, processor), out)
    runner = LocalRunner(workers if len(job.units) > 1 else 0)
    summaries = run_job(job, runner, report=log.info)
    # The parts are put together beside the index and renamed at the end, so that a killed build leaves none.
    whole = job.out / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    sums = {name: sum(summary[name] for summary in summaries) for name in ("documents", "images")}
    writer = ColumnsWriter(whole, **sums)
    with (whole / SKIPPED_FILE).open("wb") as skipped:
        for unit in job.units:
            writer.add(job.out, f"{unit.name}.")
            with (job.out / f"{unit.name}.{SKIPPED_FILE}").open("rb") as part:
                shutil.copyfileobj(part, skipped)
    # Written last: an index without its counts is none.
    causes = sum((Counter(summary["causes"]) for summary in summaries), Counter())
    digest = hashlib.sha256(json.dumps(sorted(job.files().items())).encode()).hexdigest()
    writer.close({"causes": causes, "digest": digest[:12]})
    shutil.rmtree(folder, ignore_errors=True)
    whole.rename(folder)
    shutil.rmtree(job.out, ignore_errors=True)
    return open_columns(folder)
