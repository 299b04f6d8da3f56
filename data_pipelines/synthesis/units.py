"""Tasks that make documents of documents: drafts, units of manifest lines, the manifests put together at the end.

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
from dataclasses import dataclass, field
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import atomic_write
from baichuan_omni_jax.storage.given import given_folder, given_manifest
from data_pipelines.datasets.builder.build import UNPACKED
from data_pipelines.datasets.builder.plan import Manifest, list_sources, unpack
from data_pipelines.datasets.jobs.job import Job, Unit
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import LineRange, is_blank, open_manifest
from data_pipelines.documents.prompt_writing import Source
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, reading
from data_pipelines.tools.commands import add_media_arguments, trusted_from_options


@dataclass
class Draft:
    """New documents made from `source`, the document `number` of a unit, whose folder in the output is `folder`.

    Media paths are relative to the output, as the texts of the new documents need them.
    """

    source: Document
    name: str
    folder: str
    number: int
    documents: list[tuple[str, dict]] = field(default_factory=list)
    skipped: list[SampleError] = field(default_factory=list)
    _media: dict[str, bytes | Media] = field(default_factory=dict)

    def add(self, text: Source, type: str, part: str = "") -> None:
        """Adds a new document. `part` names the manifest it goes to (default: the job's own).

        Its id is the source's with the part's name behind it, and a number from the second document of a part on.
        """
        if not isinstance(text, Source):  # a prompt that lost its type on the way: all of it would be text
            raise TypeError(f"the text of a document is a Source, not {text!r:.60}")
        part = part or self.name
        # Ids follow from the source alone, so that a unit that is done again gives the same ones.
        made = sum(other == part for other, _ in self.documents) + 1
        identifier = f"{self.source.id}-{part}" + (f"-{made}" if made > 1 else "")
        self.documents.append((part, {"id": identifier, "type": type, "text": str(text)}))

    def skip(self, cause: str, message: str) -> None:
        """Counts something of the source that could not be used, while the rest of it can."""
        self.skipped.append(SampleError(cause, message))

    def save(self, content: bytes, suffix: str) -> str:
        """Keeps a new media file with these bytes; returns its path. `suffix` is `.wav`, `.png`, ..."""
        return self._keep(content, suffix)

    def link(self, media: Media) -> str:
        """Keeps a media file of the source document, linked where the file system can; returns its path."""
        # Readers go by content; the ending is for people who look into the folder.
        suffix = Path(media.name).suffix.lower() if media.path is not None else ""
        return self._keep(media, suffix)

    def write_media(self, out: Path) -> None:
        """Writes the media below `out`, the folder that their paths are relative to.

        Raises SampleError "unreadable_media" for a file of the source that can neither be linked nor opened.
        """
        for path, content in self._media.items():
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                _link_or_copy(content, target)

    def _keep(self, content: bytes | Media, suffix: str) -> str:
        # A folder for each hundred documents: a unit of any size leaves no folder with very many files.
        path = f"{self.folder}/{self.number // 100:03d}/{self.number:05d}-{len(self._media):03d}{suffix}"
        self._media[path] = content
        return path


def _link_or_copy(media: Media, target: Path) -> None:
    # A hard link costs no bytes, and the output is whole when the source is moved.
    if media.path is not None:
        try:
            os.link(media.path, target)
            return
        except OSError:  # another file system, or one without links
            pass
    with reading(media, "file"):
        source = media.open()
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


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
        # Line by line, in the order of the manifest: what comes out does not depend on how lines are cut into units,
        # but for the folders of media.
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
        # Media are written last: a document that fails half-way leaves no file.
        try:
            self.maker(draft.source, draft)
            draft.write_media(folder)
        except SampleError as error:
            draft.documents.clear()
            return [*draft.skipped, error]
        return draft.skipped


def add_job_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that every task has."""
    parser.add_argument("manifests", metavar="MANIFEST", type=given_manifest, nargs="+", help="JSONL; also .gz or .zst")
    add_media_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=given_folder, required=True, help="manifests and media go there")
    parser.add_argument(
        "--unit", metavar="N", type=int, default=256, help="documents of one unit of work (default 256)"
    )


def manifest_job(name: str, maker: Maker, options: Namespace, config: str) -> Job:
    """Makes the job that puts every document of `options.manifests` through `maker`.

    Args:
        name: the task's word, the first part of the units' names and of the manifest's.
        maker: adds to a draft what it makes of one document.
        options: of `add_job_arguments`.
        config: all that, besides the documents, decides what comes out, as text.

    Raises:
        ConfigError: as `manifest_units`.
    """
    return Job(name, manifest_units(name, options, config), MakeDocuments(name, maker), options.out)


def manifest_units(name: str, options: Namespace, config: str) -> tuple[Unit, ...]:
    """Cuts the documents of `options.manifests` into units of `options.unit`, whose contents are `LineRange`s.

    `config` holds all that, besides the documents, decides what comes out: a unit whose lines or config changed is
    done again. Raises ConfigError for a manifest that cannot be read, is given twice, or lies where the job writes.
    """
    if options.unit < 1:
        raise ConfigError(f"--unit {options.unit}: a unit has at least 1 document")
    # A manifest in the output would be read and written by the same job.
    units = []
    manifests = list_sources(options.manifests, options.root, trusted_from_options(options))
    for manifest in manifests:
        if any(path.is_relative_to(options.out.resolve()) for path in (manifest.path, manifest.path.resolve())):
            raise ConfigError(f"--out {options.out} holds the manifest {manifest.path}: name another folder")
    for manifest in unpack(manifests, options.out / UNPACKED):
        for lines, content in _ranges(manifest, options.unit):
            # Documents without an id are named by the manifest and their line.
            facts = f"{FORMAT} {name} {config}\0{manifest.root}\0{manifest.name}\0{lines.first}\0"
            fingerprint = hashlib.sha256(facts.encode(errors="surrogateescape") + content).hexdigest()
            units.append(Unit(f"{name}-{len(units):05d}", fingerprint, lines, lines.length))
    return tuple(units)


def _ranges(manifest: Manifest, size: int) -> Iterator[tuple[LineRange, bytes]]:
    """Yields `size` lines at a time, empty ones not counted, with their bytes."""
    # Cut by documents, not by bytes: the cost of a unit is what is made of its documents.
    first, offset, number, count, lines = 1, 0, 0, 0, []
    with open_manifest(manifest.lines, manifest.name) as file:
        for number, line in enumerate(file, start=1):
            lines.append(line)
            count += not is_blank(line)
            if count == size:
                content = b"".join(lines)
                yield LineRange(manifest.lines, manifest.name, manifest.root, first, offset, len(content)), content
                first, offset, count, lines = number + 1, offset + len(content), 0, []
    if lines:
        content = b"".join(lines)
        yield LineRange(manifest.lines, manifest.name, manifest.root, first, offset, len(content)), content


def assemble(job: Job, summaries: Sequence[dict]) -> dict[str, Counter]:
    """Puts the units' manifests together, in order of the units; returns the sums of their summaries."""
    # The task's own manifest always, also an empty one; others where a maker wrote into them.
    sums = add_up(summaries, ("made", SKIPPED))
    for part in [job.title, *(part for part in sums["made"] if part != job.title)]:
        join_part(job, part, f"{part}.jsonl")
    join_part(job, SKIPPED, f"{SKIPPED}-{job.title}.jsonl")
    return sums


def add_up(summaries: Sequence[dict], keys: Sequence[str]) -> dict[str, Counter]:
    """Adds up the counts of all units under each of the keys of their summaries."""
    return {key: sum((Counter(one[key]) for one in summaries), Counter()) for key in keys}


def join_part(job: Job, part: str, name: str) -> None:
    """Writes the manifest `name`: what every unit has in its manifest `part`."""
    path = job.out / name
    with atomic_write(path, "wb") as file:
        for unit in job.units:
            if (own := job.out / unit.name / f"{part}.jsonl").is_file():
                with own.open("rb") as lines:
                    shutil.copyfileobj(lines, file)


def explain(where: str, document: Document | SampleError, error: SampleError) -> dict:
    """Makes a line of the skipped documents."""
    identifier = document.id if isinstance(document, Document) else None
    return {"id": identifier, "where": where, "cause": error.cause, "message": str(error)}


def json_line(values: dict) -> str:
    """Writes a line of a manifest."""
    return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class SynthesisTask:
    """One task of the command: its word, its help, its own options, its job.

    `make_job` makes the job that parsed options ask for (`manifest_job` around a picklable maker) and raises
    ConfigError; `finish` writes the manifests when all units are done.
    """

    name: str
    description: str
    add_arguments: Callable[[ArgumentParser], None]
    make_job: Callable[[Namespace], Job]
    finish: Callable[[Job, Sequence[dict]], dict[str, Counter]] = assemble
