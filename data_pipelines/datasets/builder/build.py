"""Building a dataset: manifests planned, cut into shards, built, and described.

DIR/dataset.json, skipped.jsonl     what the dataset holds, and the documents that it does not; written last
DIR/NAME-00000.array_record         documents of the manifest NAME.jsonl with their media
DIR/parts/NAME-00000.…              what its documents were measured to be, and what was skipped of it
DIR/.units/                         which shards are done; while it is built, what compressed manifests hold
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import atomic_write
from data_pipelines.datasets.builder.plan import Manifest, PlannedLines, first_of_same_id, plan_lines, unpack
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, folder_lock, refuse_foreign, remove_unit, run_job
from data_pipelines.datasets.shards import (
    DATASET_FILE,
    OPTIONS,
    RECORD_SCHEMA,
    SUFFIX,
    ShardFile,
    ShardWriter,
    read_description,
    write_description,
)
from data_pipelines.datasets.sources import ANY_FOLDER, media_root, trusted_folders
from data_pipelines.documents.document import Document, is_known_type
from data_pipelines.documents.manifest import LineRange
from data_pipelines.documents.measures import DocumentMeasure, collect, measure_document, totals
from data_pipelines.documents.prompt_writing import misses_marks
from data_pipelines.documents.prompts import TextElement, parse_prompt, replace_references
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, MediaReference, find_media, reading

MAX_MEDIA_BYTES = 1 << 30  # of one document: it is held in memory, here and when it is read
PARTS = "parts"  # folder for what the shards' documents were measured to be, and for what was skipped


@dataclass(frozen=True)
class ShardLines:
    """What goes into one shard: lines of a source, those that double another document, the state of the manifest.

    `doubles` has the line's number and where the first document with its id is.
    """

    source: Manifest
    lines: LineRange
    doubles: Mapping[int, str]
    state: list[int]


def build_shard(unit: Unit, folder: Path) -> dict:
    """Builds one shard: `NAME.array_record`, `parts/NAME.npz`, `parts/NAME.skipped.jsonl` below `folder`.

    Returns {"documents", "unmarked" (of them, conversations that are spoken without the marks of such), "types" (sums
    by type), "skipped" (counts by cause)}. A document that cannot be used is
    skipped. Raises ConfigError when the manifest is not what was planned.
    """
    content: ShardLines = unit.content
    if content.source.state() != content.state:
        raise ConfigError(f"manifest {content.source.name} changed while it was being built: start again")
    # Each document is written or skipped, never both: `_add` measures before it writes.
    measures: list[DocumentMeasure] = []
    skipped: list[dict] = []
    unmarked = 0
    path = folder / f"{unit.name}{SUFFIX}"
    with ShardWriter(path) as writer:
        for number, _, document in content.lines.documents():
            try:
                if isinstance(document, SampleError):
                    raise document
                measures.append(_add(document, content.doubles.get(number), writer))
                unmarked += misses_marks(parse_prompt(document.text))
            except SampleError as error:
                identifier = None if isinstance(document, SampleError) else document.id
                where = f"{content.source.name}:{number}"
                skipped.append({"where": where, "id": identifier, "cause": error.cause, "message": str(error)})
    # A shard without documents is no file; its list of skipped lines is kept all the same.
    if not measures:
        path.unlink()
    # Beside the shard: what statistics read later, and what the manifest's author must know.
    table = collect(measures)
    (folder / PARTS).mkdir()
    table.save(folder / PARTS / f"{unit.name}.npz")
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in skipped]
    (folder / PARTS / f"{unit.name}.skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    causes = Counter(one["cause"] for one in skipped)
    counts = {"documents": len(measures), "unmarked": unmarked}
    return {**counts, "types": totals(table), "skipped": dict(sorted(causes.items()))}


def _add(document: Document, double: str | None, writer: ShardWriter) -> DocumentMeasure:
    """Writes a document; returns how large it is. Raises SampleError when it is skipped."""
    if double is not None:
        raise SampleError("duplicate_id", f"{document.location} has the id {document.id!r} of {double}")
    whole, media = gather(document)
    measure = measure_document(whole)
    writer.write(whole, media)
    return measure


def gather(document: Document) -> tuple[Document, dict[str, bytes]]:
    """Reads the media of a document into memory; returns it with the bytes of each under the names that its text uses.

    Media that stand in the text as base64 get the names `base64-1`, ... and are named in the text instead. Raises
    SampleError as `parse_prompt` and `find_media`, and "too_big_media" when there are too many bytes for one record.
    """
    # Names first: every file that the text refers to by path keeps that path, base64 gets a name nobody uses.
    references = [each.reference for each in parse_prompt(document.text) if not isinstance(each, TextElement)]
    media: dict[str, Media] = {}
    names: dict[MediaReference, MediaReference] = {}
    paths = {reference.path for reference in references}
    files: dict[str, Path | None] = {}
    left = MAX_MEDIA_BYTES
    for reference in references:
        if reference in names:
            continue
        found = find_media(reference, document.media)
        # Absolute paths and URLs reveal the machine: the shard knows the file by its place in the root.
        name = found.name if reference.path else _new_name(paths | media.keys())
        if name != reference.path and name in paths | media.keys() and files.get(name) != found.path:
            name = reference.path
        names[reference] = MediaReference(path=name)
        if name not in media:
            media[name], files[name] = _read(found, name, left), found.path
            left -= media[name].size
    # The text then names what the record holds, and nothing of this machine.
    text = replace_references(document.text, lambda reference: names[reference])
    whole = replace(document, text=text, media=media)
    return whole, {name: held.data or b"" for name, held in media.items()}


def _read(found: Media, name: str, left: int) -> Media:
    with reading(found, "file"):
        if found.size > left:
            message = f"the document's media have more than {MAX_MEDIA_BYTES} bytes in all, with {name}"
            raise SampleError("too_big_media", message)
        with found.open() as file:
            return Media(name, None, file.read())


def _new_name(taken: set[str]) -> str:
    number = 1
    while f"base64-{number}" in taken:
        number += 1
    return f"base64-{number}"


SKIPPED_FILE = "skipped.jsonl"
FORMAT = 2  # raise it when the same manifests and media give other shards than before
LOCK = "build"
UNPACKED = ".units/manifests"  # what compressed manifests folder_lock, while shards are built of them


def build_dataset(
    manifests: Sequence[Path],
    out: Path,
    root: Path | None,
    documents: int,
    size: int,
    runner: Runner,
    trusted: Sequence[Path] = ANY_FOLDER,
) -> dict:
    """Builds the data set at `out`, or what is missing of it.

    The result depends on the manifests, the media and the sizes of a shard only, not on the runner or on how often the
    build was stopped.

    Args:
        manifests: JSONL files, one document a line; also compressed.
        out: the data set's folder, new, empty or of an earlier build.
        root: what media paths are relative to; None: each manifest's folder.
        documents: the most documents of a shard.
        size: the bytes from which a shard is full; a document that is larger has a shard of its own.
        runner: does the shards.
        trusted: the folders that links among the media may lead to.

    Returns:
        What its `dataset.json` holds.

    Raises:
        ConfigError: when a manifest cannot be read, `out` holds anything else, or a shard cannot be built.
    """
    if documents < 1 or size < 1:
        raise ConfigError("a shard holds at least one document and one byte")
    sources = list_sources(manifests, root, trusted)
    refuse_foreign(out, LOCK)
    with folder_lock(out, LOCK, "building"):
        # 1. Plan: which lines go into which shard follows from the files alone.
        sources = unpack(sources, out / UNPACKED)
        lines = plan_lines(sources, out / ".plan", runner)
        job = Job("building", _shards(sources, lines, documents, size), build_shard, out)
        # 2. Build: `dataset.json` goes before the first shard that it would no longer describe.
        remove_outdated(job)
        summaries = run_job(job, runner)
        # 3. Describe: written last, so that a folder with `dataset.json` is a whole data set.
        _join_skipped(job)
        shards = _describe_shards(job, summaries)
        write_description(out, shards, {"manifests": [source.name for source in sources], **_sum(summaries)})
        shutil.rmtree(out / UNPACKED, ignore_errors=True)
    return read_description(out)


def list_sources(manifests: Sequence[Path], root: Path | None, trusted: Sequence[Path] = ANY_FOLDER) -> list[Manifest]:
    """Returns the manifests with the shortest names that tell them apart: paths from the folder that all of them are
    in.

    Media paths are relative to `root`, or to each manifest's folder; links may lead to the folders of `trusted`
    (`sources.media_root`). Raises ConfigError when one is given twice, or `root` or a trusted folder is no folder.
    """
    if root is not None and not root.expanduser().is_dir():
        raise ConfigError(f"--root {root} is no folder")
    folders = trusted_folders(trusted, "--trust")
    # The folder's own name, but not what a link there leads to: media stand beside the link.
    paths = [path.parent.resolve() / path.name for path in (path.expanduser() for path in manifests)]
    if doubles := [path for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"manifest {doubles[0]} is given twice")
    common = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(common).as_posix() for path in paths]
    found: list[Manifest] = []
    for path, name in zip(paths, names, strict=True):
        # Shards are files: a name is made of what every file system takes, and numbered where two become the same.
        stem = re.sub(r"[^\w.-]+", "-", re.sub(r"(\.jsonl)?(\.(gz|zst|zstd))?$", "", name))
        same = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", other.shards) is not None for other in found)
        media = media_root(path, root.expanduser() if root else None, folders)
        found.append(Manifest(path, name, media, f"{stem}~{same + 1}" if same else stem, path))
    return found


def _shards(sources: Sequence[Manifest], lines: Sequence[PlannedLines], documents: int, size: int) -> list[Unit]:
    """Cuts the lines of each manifest into shards: the units of the job."""
    # Ids are unique over all manifests, so doubles are found over all of them together.
    double, first = first_of_same_id(np.concatenate([own.ids for own in lines]))
    starts = np.cumsum([0, *map(len, lines)])

    def where(document: int) -> str:
        owner = int(np.searchsorted(starts, document, "right")) - 1
        return f"{sources[owner].name}:{lines[owner].numbers[document - starts[owner]]}"

    units = []
    for source, own, start in zip(sources, lines, starts, strict=False):
        state = source.state()
        for number, (begin, end) in enumerate(_cuts(own.sizes, documents, size)):
            places = np.flatnonzero(double[start + begin : start + end]) + begin
            doubles = {int(own.numbers[place]): where(int(first[start + place])) for place in places}
            offset = int(own.offsets[begin])
            length = (int(own.offsets[end]) if end < len(own) else source.lines.stat().st_size) - offset
            lines_of = LineRange(source.lines, source.name, source.root, int(own.numbers[begin]), offset, length)
            # Everything that decides the shard's bytes: a shard is built again when, and only when, this changes.
            fingerprint = hashlib.sha256(
                json.dumps([FORMAT, RECORD_SCHEMA, OPTIONS, source.name, lines_of.first, doubles]).encode()
                + own.contents[begin:end].tobytes()
            )
            content = ShardLines(source, lines_of, doubles, state)
            weight = int(own.sizes[begin:end].sum())
            units.append(Unit(f"{source.shards}-{number:05d}", fingerprint.hexdigest(), content, weight))
    return units


def _cuts(sizes: np.ndarray, documents: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts consecutive lines [begin, end): at most `documents`, and `size` bytes unless one line has more.

    >>> list(_cuts(np.array([3, 3, 3, 9, 1]), 3, 6))
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    # A shard ends where the next line would exceed the bytes or the count, whichever comes first.
    ends, begin = np.cumsum(sizes), 0
    while begin < len(sizes):
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + size, "right"))
        end = min(max(end, begin + 1), begin + documents, len(sizes))
        yield begin, end
        begin = end


def remove_outdated(job: Job) -> None:
    """Removes the description when it will change, and what earlier units left that are none of this job's."""
    if any(job.summary(unit) is None for unit in job.units):
        (job.out / DATASET_FILE).unlink(missing_ok=True)
    # Marks of units that this job has not: of a manifest that is gone, or of shards cut elsewhere.
    names = {unit.name for unit in job.units}
    for mark in sorted((job.out / ".units").glob("*.json")):
        if mark.stem not in names:
            (job.out / DATASET_FILE).unlink(missing_ok=True)
            remove_unit(mark)


def _join_skipped(job: Job) -> None:
    with atomic_write(job.out / SKIPPED_FILE, "wb") as file:
        for unit in job.units:
            with (job.out / PARTS / f"{unit.name}.skipped.jsonl").open("rb") as own:
                shutil.copyfileobj(own, file)


def _describe_shards(job: Job, summaries: Sequence[dict]) -> list[ShardFile]:
    files = job.files()
    shards = []
    for unit, summary in zip(job.units, summaries, strict=True):
        if summary["documents"]:
            name = f"{unit.name}{SUFFIX}"
            shards.append(ShardFile(name, summary["documents"], *files[name]))
    return shards


def _sum(summaries: Sequence[dict]) -> dict:
    """Sums up what the shards folder_lock, by type and together."""
    # By type, then over all types; keys that no document has are 0.
    types: dict[str, Counter] = {}
    for summary in summaries:
        for name, sums in summary["types"].items():
            types.setdefault(name, Counter()).update(sums)
    whole = sum((Counter(sums) for sums in types.values()), Counter())
    skipped = sum((Counter(summary["skipped"]) for summary in summaries), Counter())
    return {
        "documents": whole["documents"],
        "characters": whole["characters"],
        "pictures": whole["pictures"],
        "pixels": whole["pixels"],
        "videos": whole["videos"],
        "video_hours": round(whole["video_seconds"] / 3600, 4),
        "sounds": whole["sounds"],
        "audio_hours": round(whole["audio_seconds"] / 3600, 4),
        "media_bytes": whole["media_bytes"],
        "types": {name: {key: round(value, 3) for key, value in types[name].items()} for name in sorted(types)},
        "unknown_types": sorted(name for name in types if not is_known_type(name)),
        "unmarked_speech": sum(summary["unmarked"] for summary in summaries),
        "skipped": dict(sorted(skipped.items())),
    }
