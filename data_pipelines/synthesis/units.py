"""Jobs over ranges of manifest lines: the units, the work on one of them, the manifests put together at the end.

OUT/NAME.jsonl, OUT/skipped-NAME.jsonl       all units' documents, and all that were skipped, in manifest order
OUT/NAME-00003/NAME.jsonl, .../skipped.jsonl what unit 3 made
OUT/NAME-00003/000/00007-002.wav             its media: third file of its document 7
"""

import hashlib
import json
import os
import shutil
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.build import UNPACKED, list_sources
from data_pipelines.datasets.builder.plan import Source, unpack
from data_pipelines.datasets.jobs import Job, Unit
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import LineRange, is_blank, open_manifest
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.draft import Draft
from data_pipelines.tools.commands import add_media_arguments, trusted_names

SKIPPED = "skipped"
FORMAT = 2  # raise it when the same documents and options give something else than before

# Adds to the draft what it makes of a document; raises SampleError for one that it cannot use. Picklable.
Maker = Callable[[Document, Draft], None]


@dataclass(frozen=True)
class MakeDocuments:
    """The work on one unit: every document through `maker`."""

    name: str
    maker: Maker

    def __call__(self, unit: Unit, folder: Path) -> dict:
        """Writes a unit's files; returns {"made": documents by manifest, "skipped": documents by cause}."""
        made, skipped = Counter(), Counter()
        (folder / unit.name).mkdir()
        parts: dict[str, list[str]] = {}
        for number, line in enumerate(unit.content.documents()):
            where, document = f"{unit.content.name}:{line.number}", line.document
            if isinstance(document, SampleError):
                documents, errors = [], [document]
            else:
                draft = Draft(document, self.name, unit.name, number)
                errors = self._make(draft, folder)
                documents = draft.documents
            for part, values in documents:
                made[part] += 1
                parts.setdefault(part, []).append(json_line(values))
            for error in errors:
                skipped[error.cause] += 1
                parts.setdefault(SKIPPED, []).append(json_line(explain(where, document, error)))
        for part, lines in parts.items():
            (folder / unit.name / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"made": dict(sorted(made.items())), SKIPPED: dict(sorted(skipped.items()))}

    def _make(self, draft: Draft, folder: Path) -> list[SampleError]:
        """Makes the documents of one draft, all of them or none; returns what was skipped."""
        try:
            self.maker(draft.source, draft)
            draft.write_media(folder)
        except SampleError as error:
            draft.documents.clear()
            return [*draft.skipped, error]
        return draft.skipped


def add_job_arguments(parser: ArgumentParser) -> None:
    """The arguments that every job has."""
    parser.add_argument("manifests", metavar="MANIFEST", type=Path, nargs="+", help="JSONL; also .gz or .zst")
    add_media_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="manifests and media go there")
    parser.add_argument(
        "--unit", metavar="N", type=int, default=256, help="documents of one unit of work (default 256)"
    )


def manifest_job(name: str, maker: Maker, options: Namespace, settings: str) -> Job:
    """The job that puts every document of `options.manifests` through `maker`; see `manifest_units`."""
    return Job(name, manifest_units(name, options, settings), MakeDocuments(name, maker), options.out)


def manifest_units(name: str, options: Namespace, settings: str) -> tuple[Unit, ...]:
    """The documents of `options.manifests` in units of `options.unit`, whose contents are `LineRange`s.

    `settings` says all that, besides the documents, decides what comes out: a unit whose lines or settings changed is
    done again. Raises ConfigError for a manifest that cannot be read, is given twice, or lies where the job writes.
    """
    if options.unit < 1:
        raise ConfigError(f"--unit {options.unit}: a unit has at least 1 document")
    units = []
    sources = list_sources(options.manifests, options.root, trusted_names(options))
    for source in sources:
        if any(path.is_relative_to(options.out.resolve()) for path in (source.path, source.path.resolve())):
            raise ConfigError(f"--out {options.out} holds the manifest {source.path}: name another folder")
    for source in unpack(sources, options.out / UNPACKED):
        for lines, content in _ranges(source, options.unit):
            # Documents without an id are named by the manifest and their line.
            told = f"{FORMAT} {name} {settings}\0{source.root}\0{source.name}\0{lines.first}\0"
            fingerprint = hashlib.sha256(told.encode(errors="surrogateescape") + content).hexdigest()
            units.append(Unit(f"{name}-{len(units):05d}", fingerprint, lines, lines.length))
    return tuple(units)


def _ranges(source: Source, size: int) -> Iterator[tuple[LineRange, bytes]]:
    """`size` lines at a time, empty ones not counted, with their bytes."""
    first, offset, number, count, lines = 1, 0, 0, 0, []
    with open_manifest(source.lines, source.name) as file:
        for number, line in enumerate(file, start=1):
            lines.append(line)
            count += not is_blank(line)
            if count == size:
                content = b"".join(lines)
                yield LineRange(source.lines, source.name, source.root, first, offset, len(content)), content
                first, offset, count, lines = number + 1, offset + len(content), 0, []
    if lines:
        content = b"".join(lines)
        yield LineRange(source.lines, source.name, source.root, first, offset, len(content)), content


def assemble(job: Job, summaries: Sequence[dict]) -> dict[str, Counter]:
    """Puts the units' manifests together, in order of the units; returns the sums of their summaries."""
    sums = add_up(summaries, ("made", SKIPPED))
    for part in [job.title, *(part for part in sums["made"] if part != job.title)]:
        join_part(job, part, f"{part}.jsonl")
    join_part(job, SKIPPED, f"{SKIPPED}-{job.title}.jsonl")
    return sums


def add_up(summaries: Sequence[dict], keys: Sequence[str]) -> dict[str, Counter]:
    """The counts of all units under each of the keys of their summaries."""
    return {key: sum((Counter(one[key]) for one in summaries), Counter()) for key in keys}


def join_part(job: Job, part: str, name: str) -> None:
    """Writes the manifest `name`: what every unit has in its manifest `part`."""
    path = job.out / name
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for unit in job.units:
            if (own := job.out / unit.name / f"{part}.jsonl").is_file():
                with own.open("rb") as lines:
                    shutil.copyfileobj(lines, file)
    os.replace(partial, path)


def explain(where: str, document: Document | SampleError, error: SampleError) -> dict:
    """A line of the skipped documents."""
    identifier = document.id if isinstance(document, Document) else None
    return {"id": identifier, "where": where, "cause": error.cause, "message": str(error)}


def json_line(values: dict) -> str:
    """A line of a manifest."""
    return json.dumps(values, ensure_ascii=False) + "\n"
