"""Building and caching an index: every document of a source measured once, in parallel, resumably.

CACHE/NAME-KEY/            the index (columns.py), there only when it is whole
CACHE/NAME-KEY.building/   what its units have measured so far, with jobs' marks
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from baichuan_omni_jax.config import DataConfig, SourceConfig
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job, Unit, run_job
from data_pipelines.datasets.jobs.local import LocalRunner
from data_pipelines.datasets.sources import ManifestSource, Source, cache_folder, open_source
from data_pipelines.documents.manifest import manifest_stem
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError
from data_pipelines.packing.columns import (
    SKIPPED_FILE,
    Columns,
    ColumnsWriter,
    make_columns,
    open_columns,
    write_columns,
)
from data_pipelines.packing.index import Index

FILE_CAUSES = ("missing_file", "outside_root", "unreadable_media", "too_big_media")
FORMAT = 7  # of cached indexes: raise it when they hold something else than before
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasurePart:
    """The work on one part of a source: its columns, and what is skipped."""

    source: Source
    processor: Processor

    def __call__(self, unit: Unit, folder: Path) -> dict:
        lengths, places, numbers, causes = [], [], [], Counter()
        with (folder / f"{unit.name}.{SKIPPED_FILE}").open("w", encoding="utf-8") as skipped:
            for entry in self.source.read(unit.content):
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
    """The index of the manifest or data set of `entry`, from the cache when it and the processor are those that it was
    built with, else built: by `workers` processes where there is work for more than one.

    A cached index that is damaged is built anew. Raises ConfigError when the source cannot be read.
    """
    try:
        source = open_source(config, entry)
        told = f"{FORMAT} {processor.fingerprint} {source.fingerprint} {source.media_key}"
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
    except ConfigError as error:
        raise ConfigError(f"source {entry.name}: {error}") from error
    if source.tokenizer not in ("", processor.tokenizer_fingerprint):
        raise ConfigError(
            f"source {entry.name}: {entry.manifest} holds token ids of tokenizer {source.tokenizer}, not of "
            f"{processor.tokenizer_fingerprint}, the one in use: set data.tokenizer to the file it was cached with"
        )
    folder = cache_folder(config) / f"{Path(manifest_stem(entry.manifest)).name}-{key}"
    try:
        columns = open_columns(folder)
        _tell_old_causes(source, columns)
    except FileNotFoundError:
        columns = _build(source, processor, folder, workers)
    except (ValueError, OSError) as error:
        log.warning("the index %s is damaged and built anew: %s", folder, error)
        columns = _build(source, processor, folder, workers)
    return Index(entry.name, source, columns)


def _tell_old_causes(source: Source, columns: Columns) -> None:
    """Loose files of skipped documents may have been mended since they were measured."""
    files = sum(columns.meta.get("causes", {}).get(cause, 0) for cause in FILE_CAUSES)
    if files and isinstance(source, ManifestSource):
        log.warning(
            "%s: %d skipped for files as they once were; delete %s to look again", source.path, files, columns.folder
        )


def _build(source: Source, processor: Processor, folder: Path, workers: int) -> Columns:
    job = _job(source, processor, folder)
    runner = LocalRunner(workers if len(job.units) > 1 else 0)
    summaries = run_job(job, runner, report=log.info)
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
    causes = sum((Counter(summary["causes"]) for summary in summaries), Counter())
    digest = hashlib.sha256(json.dumps(sorted(job.files().items())).encode()).hexdigest()
    writer.close({"causes": causes, "digest": digest[:12]})
    shutil.rmtree(folder, ignore_errors=True)
    whole.rename(folder)
    shutil.rmtree(job.out, ignore_errors=True)
    return open_columns(folder)


def _job(source: Source, processor: Processor, folder: Path) -> Job:
    units = [Unit(f"part-{place:06d}", folder.name, part, part.length) for place, part in enumerate(source.parts)]
    out = folder.with_name(f"{folder.name}.building")
    return Job(f"index of {source.path}", units, MeasurePart(source, processor), out)
