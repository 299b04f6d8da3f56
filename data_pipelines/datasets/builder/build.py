"""Builds a data set from manifests: shards of documents with their media inside.

What cannot be used is skipped, counted by cause and named in DIR/skipped.jsonl. A build that was stopped goes on where
it was when the same command is given again, and one whose manifests or media changed builds the shards that changed.
"""

# DIR/dataset.json, skipped.jsonl     what the dataset holds, and the documents that it does not; written last
# DIR/NAME-00000.array_record         documents of the manifest NAME.jsonl with their media
# DIR/parts/NAME-00000.…              what its documents were measured to be, and what was skipped of it
# DIR/.units/                         which shards are done; while it is built, what compressed manifests hold

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import atomic_write
from baichuan_omni_jax.storage.given import given_folder, given_manifest
from data_pipelines.datasets.builder.plan import ShardLines, cut_shards, list_sources, plan_lines, unpack
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, folder_lock, refuse_foreign, remove_unit, run_job
from data_pipelines.datasets.shards import (
    DATASET_FILE,
    SUFFIX,
    ShardFile,
    ShardWriter,
    read_description,
    write_description,
)
from data_pipelines.datasets.sources import ANY_FOLDER
from data_pipelines.documents.document import Document, is_known_type
from data_pipelines.documents.measures import DocumentMeasure, collect, measure_document, totals
from data_pipelines.documents.prompt_writing import misses_marks
from data_pipelines.documents.prompts import TextElement, VideoElement, parse_prompt, replace_references
from data_pipelines.errors import SampleError, describe_causes, first_of_causes
from data_pipelines.media.frame_tracks import FrameSpec, extract_frames
from data_pipelines.media.location import Media, MediaReference, find_media, reading
from data_pipelines.tokenizers.tokenizer import AUDIOTEXT_START, VIDEO_START
from data_pipelines.tools.commands import (
    add_media_arguments,
    add_runner_arguments,
    run_command,
    run_job_command,
    runner_from_options,
    skipped_lines,
    trusted_from_options,
)

MAX_MEDIA_BYTES = 1 << 30  # of one document: it is held in memory, here and when it is read
FRAMES = ".frames.mov"  # behind the name of a video of which only frames are kept
PARTS = "parts"  # folder for what the shards' documents were measured to be, and for what was skipped


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
                measures.append(_add(document, content.doubles.get(number), writer, content.frames))
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


def _add(
    document: Document, double: str | None, writer: ShardWriter, frames: FrameSpec | None = None
) -> DocumentMeasure:
    """Writes a document; returns how large it is. Raises SampleError when it is skipped."""
    if double is not None:
        raise SampleError("duplicate_id", f"{document.location} has the id {document.id!r} of {double}")
    whole, media = gather(document, frames)
    measure = measure_document(whole)
    writer.write(whole, media)
    return measure


def gather(document: Document, frames: FrameSpec | None = None) -> tuple[Document, dict[str, bytes]]:
    """Reads the media of a document into memory; returns it with the bytes of each under the names that its text uses.

    Media that stand in the text as base64 get the names `base64-1`, ... and are named in the text instead. Of videos
    only the `frames` are kept where these are given (`NAME.frames.mov`); the file itself where it is also heard. Raises
    SampleError as `parse_prompt` and `find_media`, and "too_big_media" when there are too many bytes for one record.
    """
    # Names first: every file that the text refers to by path keeps that path, base64 gets a name nobody uses.
    elements = [each for each in parse_prompt(document.text) if not isinstance(each, TextElement)]
    media: dict[str, Media] = {}
    names: dict[tuple[MediaReference, bool], MediaReference] = {}
    paths = {each.reference.path for each in elements}
    files: dict[str, Path | None] = {}
    left = MAX_MEDIA_BYTES
    for element in elements:
        reference, seen = element.reference, frames is not None and isinstance(element, VideoElement)
        if (reference, seen) in names:
            continue
        found = find_media(reference, document.media)
        # Absolute paths and URLs reveal the machine: the shard knows the file by its place in the root.
        name = found.name if reference.path else _new_name(paths | media.keys())
        while seen and (not name.endswith(FRAMES) or name in paths):
            name += FRAMES
        if name != reference.path and name in paths | media.keys() and files.get(name) != found.path:
            name = reference.path
        names[reference, seen] = MediaReference(path=name)
        if name not in media:
            taken = Media(name, None, extract_frames(found, frames, left)) if frames and seen else None
            media[name], files[name] = taken or _read(found, name, left), found.path
            left -= media[name].size
    # The text then names what the record holds, and nothing of this machine.
    is_video = lambda mark: frames is not None and mark == VIDEO_START  # noqa: E731
    text = replace_references(document.text, lambda reference, mark: names[reference, is_video(mark)])
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
    frames: FrameSpec | None = None,
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
        frames: which frames are kept of videos; None: the files as they are.

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
        job = Job("building", cut_shards(sources, lines, documents, size, frames), build_shard, out)
        # 2. Build: `dataset.json` goes before the first shard that it would no longer describe.
        remove_outdated(job)
        summaries = run_job(job, runner)
        # 3. Describe: written last, so that a folder with `dataset.json` is a whole data set.
        _join_skipped(job)
        shards = _describe_shards(job, summaries)
        kept = {} if frames is None else {"frames": str(frames)}
        manifests_of = [source.name for source in sources]
        write_description(out, shards, {"manifests": manifests_of, **kept, **_sum(summaries)})
        shutil.rmtree(out / UNPACKED, ignore_errors=True)
    return read_description(out)


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


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def _build(options: argparse.Namespace) -> None:
    size = _bytes(options.shard_bytes)
    runner = runner_from_options(options)
    manifests, trusted = options.manifests, trusted_from_options(options)
    frames = FrameSpec.parse(options.frames) if options.frames else None
    out, root, documents = options.out, options.root, options.shard_documents
    dataset = build_dataset(manifests, out, root, documents, size, runner, trusted, frames)
    for line in describe(dataset):
        print(line)
    # What was skipped, by cause with one example; all of it is in a file.
    causes = []
    if skipped := dataset["skipped"]:
        path = options.out / SKIPPED_FILE
        causes = describe_causes(skipped, first_of_causes(skipped_lines(path), skipped))
        for line in causes:
            print(f"  {line}")
        print(f"each of them, with its cause: {path}")
    if not dataset["documents"]:
        names = ", ".join(dataset["manifests"])
        raise ConfigError(
            f"no document of {names} can be used: {'; '.join(causes)}" if causes else f"{names}: no document"
        )


def describe(dataset: Mapping) -> list[str]:
    """Describes what a `dataset.json` holds, in lines."""
    size = sum(shard["bytes"] for shard in dataset["shards"])
    lines = [
        f"{dataset['documents']} documents in {len(dataset['shards'])} shards, {size / 2**20:.1f} MiB: "
        f"{dataset['pictures']} images ({dataset['pixels'] / 1e6:.1f} megapixels), "
        f"{dataset['videos']} videos ({dataset['video_hours']:.2f} h), "
        f"{dataset['sounds']} audio clips ({dataset['audio_hours']:.2f} h), {dataset['characters']} characters"
    ]
    lines += [f"  {name or '(no type)':<20}{sums['documents']:>10}" for name, sums in dataset["types"].items()]
    if unknown := dataset["unknown_types"]:
        lines.append(f"types outside the known ones: {', '.join(name or '(no type)' for name in unknown)}")
    if unmarked := dataset["unmarked_speech"]:
        what = f"{unmarked} conversations answer in speech without {AUDIOTEXT_START} before each answer"
        lines.append(f"{what} (docs/how-to/data.md)")
    if skipped := dataset["skipped"]:
        lines.append(f"{sum(skipped.values())} documents are skipped:")
    return lines


def _bytes(text: str) -> int:
    """256M -> 268435456. Raises ConfigError."""
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"--shard-bytes {text} is no number of bytes such as 64M or 2G")
    return int(number) * _UNITS.get(unit, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "manifests",
        metavar="MANIFEST",
        type=given_manifest,
        nargs="+",
        help="JSONL, one document a line; also .gz or .zst",
    )
    add("--out", metavar="DIR", type=given_folder, required=True, help="a new or empty folder, or an earlier build")
    add_media_arguments(parser)
    add("--shard-documents", metavar="N", type=int, default=4096, help="most documents of a shard (default 4096)")
    add("--shard-bytes", metavar="SIZE", default="256M", help="size from which a shard is full (default 256M)")
    add(
        "--frames",
        metavar="RATE",
        default="",
        help="keep of each video only the frames a model takes, as JPEG: 1fps, or 1fps:32 for at most 32 of a video",
    )
    add_runner_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    return run_job_command(lambda: _build(arguments), arguments.out)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("build", __doc__, add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
