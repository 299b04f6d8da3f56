"""Building one shard: documents with the bytes of their media, what was skipped, how large everything is."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.plan import Source
from data_pipelines.datasets.jobs import Unit
from data_pipelines.datasets.shards.writer import SUFFIX, ShardWriter
from data_pipelines.documents.conversation import misses_marks
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import LineRange
from data_pipelines.documents.prompts import Reference, Text, parse_prompt, replace_references
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, find_media, reading
from data_pipelines.media.measures import DocumentMeasure, collect, measure_document, totals

MAX_MEDIA_BYTES = 1 << 30  # of one document: it is held in memory, here and when it is read
PARTS = "parts"  # folder for what the shards' documents were measured to be, and for what was skipped


@dataclass(frozen=True)
class ShardLines:
    """What goes into one shard: lines of a source, those that double another document, the state of the manifest.

    `doubles` has the line's number and where the first document with its id is.
    """

    source: Source
    lines: LineRange
    doubles: Mapping[int, str]
    state: list[int]


def build_shard(unit: Unit, folder: Path) -> dict:
    """The work on one shard: `NAME.array_record`, `parts/NAME.npz`, `parts/NAME.skipped.jsonl` below `folder`.

    Returns {"documents", "unmarked" (of them, conversations that are spoken without the marks of such), "types" (sums
    by type), "skipped" (counts by cause)}. A document that cannot be used is
    skipped. Raises ConfigError when the manifest is not what was planned.
    """
    content: ShardLines = unit.content
    if content.source.state() != content.state:
        raise ConfigError(f"manifest {content.source.name} changed while it was being built: start again")
    measures: list[DocumentMeasure] = []
    skipped: list[dict] = []
    unmarked = 0
    path = folder / f"{unit.name}{SUFFIX}"
    with ShardWriter(path) as writer:
        for number, _, document in content.lines.documents():
            try:
                measures.append(_add(document, content.doubles.get(number), writer))
                unmarked += misses_marks(parse_prompt(document.text))
            except SampleError as error:
                identifier = None if isinstance(document, SampleError) else document.id
                where = f"{content.source.name}:{number}"
                skipped.append({"where": where, "id": identifier, "cause": error.cause, "message": str(error)})
    if not measures:
        path.unlink()
    table = collect(measures)
    (folder / PARTS).mkdir()
    table.save(folder / PARTS / f"{unit.name}.npz")
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in skipped]
    (folder / PARTS / f"{unit.name}.skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    causes = Counter(one["cause"] for one in skipped)
    counts = {"documents": len(measures), "unmarked": unmarked}
    return {**counts, "types": totals(table), "skipped": dict(sorted(causes.items()))}


def _add(document: Document | SampleError, double: str | None, writer: ShardWriter) -> DocumentMeasure:
    """Writes a document; returns how large it is. Raises SampleError when it is skipped."""
    if isinstance(document, SampleError):
        raise document
    if double is not None:
        raise SampleError("duplicate_id", f"{document.where} has the id {document.id!r} of {double}")
    whole = gather(document)
    measure = measure_document(whole)
    writer.write(whole, {name: media.data for name, media in whole.media.items()})
    return measure


def gather(document: Document) -> Document:
    """The document with its media in memory under the names that its text uses.

    Media that stand in the text as base64 get the names `base64-1`, ... and are named in the text instead. Raises
    SampleError as `parse_prompt` and `find_media`, and "too_big_media" when there are too many bytes for one record.
    """
    references = [each.reference for each in parse_prompt(document.text) if not isinstance(each, Text)]
    media: dict[str, Media] = {}
    names: dict[Reference, Reference] = {}
    paths = {reference.path for reference in references}
    files: dict[str, Path | None] = {}
    left = MAX_MEDIA_BYTES
    for reference in references:
        if reference in names:
            continue
        found = find_media(reference, document.media)
        # Absolute paths and URLs tell about the machine: the shard knows the file by its place in the root.
        name = found.name if reference.path else _new_name(paths | media.keys())
        if name != reference.path and name in paths | media.keys() and files.get(name) != found.path:
            name = reference.path
        names[reference] = Reference(path=name)
        if name not in media:
            media[name], files[name] = _read(found, name, left), found.path
            left -= len(media[name].data)
    text = replace_references(document.text, lambda reference: names[reference])
    return replace(document, text=text, media=media)


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
