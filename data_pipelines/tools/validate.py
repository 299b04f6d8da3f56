"""Reads a built data set through and prints what is wrong, by cause.

Every file's size and checksum, every record, every medium decoded. Exit code 0 when all is well, 1 when anything is
wrong, 2 when DIR cannot be used at all.

| cause | |
|---|---|
| `bad_checksum` | a shard's bytes are not those that were written; records that suffered are named as well |
| `bad_record` | a record cannot be read, or a medium in it is not what was written |
| `duplicate_id` | another document has the id |
| `damaged_packets` | packets of audio or a video cannot be decoded; the document is used without them |
| `crash` | the process that read the shard died |
| others | as in docs/how-to/data.md: the document cannot be used |
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np

from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.storage.given import given_file, given_input
from data_pipelines.datasets.builder.plan import first_of_same_id
from data_pipelines.datasets.jobs.job import Job, JobProgress, Runner, Unit
from data_pipelines.datasets.shards import ShardedDataset, ShardFile, open_dataset
from data_pipelines.documents.document import Document, check_ids
from data_pipelines.documents.prompts import (
    Element,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    parse_prompt,
)
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import read_audio
from data_pipelines.media.containers import Damage
from data_pipelines.media.images import decode_image
from data_pipelines.media.location import Media, find_media
from data_pipelines.media.videos import read_video
from data_pipelines.tools.commands import add_runner_arguments, run_command, runner_from_options

NAMED = 10  # ids that are printed of each cause
RATE = 16000  # Hz that audio is decoded at
FRAMES_PER_SECOND, MAX_FRAMES = 1.0, 32


@dataclass(frozen=True)
class Problem:
    """Something wrong: the record it is in (or a shard), the document's id where it is known, its cause, a sentence."""

    where: str
    id: str | None
    cause: str
    message: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=given_input, help="a folder that holds dataset.json")
    add("--report", metavar="FILE", type=given_file, help="writes every problem there, one JSON object a line")
    add_runner_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0 when all is well, 1 when anything is wrong, 2 for what is no data set."""
    found: list[Problem] = []
    return exit_code(lambda: _validate(arguments, found)) or int(bool(found))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("validate", __doc__, add_arguments, run, arguments)


def _validate(options: argparse.Namespace, found: list[Problem]) -> None:
    dataset = open_dataset(options.folder)
    found += validate(dataset, runner_from_options(options))
    if options.report:
        lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in found]
        try:
            options.report.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--report {options.report} cannot be written: {error.strerror}") from error
    # By cause, the most frequent first, with the first records of each: a damaged disk gives thousands.
    for cause, count in Counter(problem.cause for problem in found).most_common():
        print(f"{cause}: {count}")
        of_cause = [problem for problem in found if problem.cause == cause]
        for problem in of_cause[:NAMED]:
            print(f"  {problem.where}{f' id {problem.id!r}' if problem.id else ''}: {problem.message}")
        if count > NAMED:
            print(f"  ... and {count - NAMED} more")
    wrong = f"{len(found)} problems" if found else "nothing is wrong"
    print(f"{options.folder}: {len(dataset)} documents in {len(dataset.shards)} shards, {wrong}")


def validate(dataset: ShardedDataset, runner: Runner) -> list[Problem]:
    """Finds everything that is wrong with the data set, shard after shard; progress is printed."""
    # Units without fingerprints in a folder that goes away: validation is never resumed, what it saw may have changed.
    units = [Unit(f"shard-{i:05d}", "", (dataset, i), shard.bytes) for i, shard in enumerate(dataset.shards)]
    problems: list[list[Problem]] = [[] for _ in units]
    ids = [np.zeros((shard.documents, 2), np.uint64) for shard in dataset.shards]
    numbers = {unit.name: number for number, unit in enumerate(units)}
    # Beside the shards, so that Beam's workers share it too.
    with tempfile.TemporaryDirectory(dir=_writable(Path(dataset.folder)), prefix=".validate-") as scratch:
        job = Job("validating", units, check_shard, Path(scratch))
        progress = JobProgress(job, units, print)
        with closing(runner(job, units)) as outcomes:
            for unit, outcome in outcomes:
                progress.done(unit, outcome)
                number = numbers[unit.name]
                # A crash costs the report of its shard alone.
                if isinstance(outcome, Exception):
                    problems[number] = [Problem(dataset.shards[number].file, None, "crash", str(outcome))]
                else:
                    problems[number] = [Problem(*problem) for problem in outcome["problems"]]
                    ids[number] = np.frombuffer(bytes.fromhex(outcome["ids"]), "<u8").reshape(-1, 2)
    return [problem for own in problems for problem in own] + _doubles(dataset, ids)


def _doubles(dataset: ShardedDataset, ids: Sequence[np.ndarray]) -> list[Problem]:
    """Finds documents with the id of an earlier one; `ids` has the hashes of each shard's, zeros where one is
    not known.
    """
    # Over all shards together, as the builder does: an id is unique in the data set.
    double, first = first_of_same_id(np.concatenate([np.zeros((0, 2), np.uint64), *ids]))
    starts = np.cumsum([0, *map(len, ids)])

    def place(document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(starts, document, "right")) - 1
        return shard, document - int(starts[shard])

    def where(document: int) -> str:
        shard, record = place(document)
        return f"{dataset.shards[shard].file} record {record}"

    return [
        Problem(
            where(number),
            dataset.document(*place(number)).id,
            "duplicate_id",
            f"{where(int(first[number]))} has the same id",
        )
        for number in np.flatnonzero(double).tolist()
    ]


def _writable(folder: Path) -> Path | None:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".validate-"):
            return folder
    except OSError:
        return None


def check_shard(unit: Unit, folder: Path) -> dict:
    """Checks one shard. Returns {"problems": [...], "ids": hashes of the records' ids, 32 hex digits each}."""
    dataset, number = unit.content
    shard = dataset.shards[number]
    # The file first, then every record of it: a wrong checksum alone does not tell which documents suffer.
    problems = [*_check_file(Path(dataset.folder) / shard.file, shard)]
    identifiers: list[str] = []
    for record, document in enumerate(dataset.documents_of(number)):
        known = isinstance(document, Document)
        # A hash of 128 bits a document: ids of 10^8 documents fit into memory.
        identifiers.append(sha256(document.id.encode()).hexdigest()[:32] if known else "0" * 32)
        try:
            if isinstance(document, SampleError):
                raise document
            check_document(document)
        except SampleError as error:
            where = f"{shard.file} record {record}"
            problems.append(Problem(where, document.id if known else None, error.cause, str(error)))
    return {"problems": [list(asdict(problem).values()) for problem in problems], "ids": "".join(identifiers)}


def _check_file(path: Path, shard: ShardFile) -> Sequence[Problem]:
    try:
        with path.open("rb") as file:
            digest, size = file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        return [Problem(shard.file, None, "bad_checksum", f"it cannot be read: {error.strerror}")]
    if digest == shard.sha256:
        return []
    changed = f"it has {size} of {shard.bytes} bytes" if size != shard.bytes else "its bytes are not those written"
    return [Problem(shard.file, None, "bad_checksum", changed)]


def check_document(document: Document) -> None:
    """Decodes every medium of a document of a shard. Raises SampleError for the first thing that is wrong."""
    if not isinstance(document.media, Mapping):
        raise TypeError("the media of a document of a shard are in memory")
    # What the record says of its media, then what decoders say.
    for media in document.media.values():
        if sha256(media.data).hexdigest() != media.digest:
            raise SampleError("bad_record", f"{media.name} is not what was written")
    # Every medium as the pipeline reads it, whole: headers may be right where samples are not.
    damaged = []
    for element in parse_prompt(document.text):
        if not isinstance(element, TextElement):
            media = find_media(element.reference, document.media)
            if packets := _decode(element, media):
                damaged.append(f"{media.name}: {packets} packets are damaged; the rest is used")
    if damaged:
        raise SampleError("damaged_packets", "; ".join(damaged))


def _decode(element: Element, media: Media) -> int:
    """Returns how many packets of it are damaged: audio and videos are used without them."""
    if isinstance(element, ImageElement):
        decode_image(media)
    elif isinstance(element, VideoElement):
        damage = Damage()
        for _ in read_video(media, FRAMES_PER_SECOND, MAX_FRAMES, damage)[1]:
            pass
        return damage.damaged
    elif isinstance(element, TokensElement):
        check_ids(media)
    else:
        return read_audio(media, RATE).damaged
    return 0


if __name__ == "__main__":
    sys.exit(main())
