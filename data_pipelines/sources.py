"""Where documents come from: a JSONL manifest or a built data set, read in parts, or one document at a time."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import Document, SampleError
from data_pipelines.jobs.job import write_json
from data_pipelines.manifest import LineRange, parse_line
from data_pipelines.shards.dataset import DATASET_FILE, ShardedDataset, open_dataset, read_description

PART_BYTES = 64 << 20  # of a manifest


class Entry(NamedTuple):
    """One document of a source, or why it holds none. `place` (int64) and `number` (int32) find it again."""

    place: int
    number: int
    where: str
    document: Document | SampleError


@dataclass(frozen=True)
class Records:
    """A part of a built data set: one shard of `length` bytes."""

    shard: int
    length: int


class ManifestSource:
    """The manifest at `root/path`. A place is the byte at which a line begins, a number that of the line, from 1."""

    tokenizer = ""  # lines that hold token ids are checked one by one

    def __init__(self, path: str, root: Path, notes: Path):
        """`notes` is a folder where what a manifest's bytes gave is kept: they are read whole only when it changed."""
        self.path, self.root, self._notes = path, root, notes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest."""
        return self._survey["sha256"]

    @cached_property
    def parts(self) -> list[LineRange]:
        """Whole lines, about `PART_BYTES` each."""
        path = self.root / self.path
        return [LineRange(path, self.path, self.root, *numbers) for numbers in self._survey["parts"]]

    def read(self, part: LineRange) -> Iterator[Entry]:
        """The documents of a part; empty lines are passed over."""
        for line in part.documents():
            yield Entry(line.offset, line.number, self.where(line.offset, line.number), line.document)

    def document(self, place: int, number: int) -> Document:
        """One document. Raises SampleError `bad_json` when its line is no longer what it was."""
        with open(self.root / self.path, "rb") as file:
            file.seek(place)
            return parse_line(file.readline(), number, self.path, self.root)

    def where(self, place: int, number: int) -> str:
        return f"{self.path}:{number}"

    @cached_property
    def _survey(self) -> dict:
        path = (self.root / self.path).resolve()
        note = self._notes / f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.lines.json"
        known = _read_note(note)
        try:
            status = path.stat()
            told = {"path": str(path), "size": status.st_size, "changed": status.st_mtime_ns, "part": PART_BYTES}
            if known is not None and all(known.get(name) == value for name, value in told.items()):
                return known
            known = told | _survey(path)
        except OSError as error:
            raise ConfigError(f"manifest {self.root / self.path} cannot be read: {error.strerror}") from error
        write_json(note, known)
        return known


class DatasetSource:
    """The built data set in the folder `root/path`. A place is shard * 2^32 + record, a number that of the record."""

    def __init__(self, path: str, root: Path):
        self.path, self.root = path, root
        self._dataset: ShardedDataset = open_dataset(root / path)
        # Of the token ids that it holds; "" where it holds text.
        self.tokenizer: str = read_description(root / path).get("tokenizer", "")

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    @property
    def parts(self) -> list[Records]:
        """One a shard."""
        return [Records(number, shard.bytes) for number, shard in enumerate(self._dataset.shards)]

    def read(self, part: Records) -> Iterator[Entry]:
        """The documents of a shard."""
        for record, document in enumerate(self._dataset.documents_of(part.shard)):
            place = part.shard << 32 | record
            yield Entry(place, record, self.where(place, record), document)

    def document(self, place: int, number: int) -> Document:
        """One document. Raises SampleError `bad_record` when its shard is damaged there."""
        return self._dataset.document(place >> 32, number)

    def where(self, place: int, number: int) -> str:
        return f"{self.path}/{self._dataset.shards[place >> 32].file}:{number}"


Source = ManifestSource | DatasetSource


def open_source(path: str, root: Path, notes: Path) -> Source:
    """The built data set or the manifest at `root/path`. Raises ConfigError for a data set that cannot be read."""
    if (root / path / DATASET_FILE).is_file():
        return DatasetSource(path, root)
    return ManifestSource(path, root, notes)


def _read_note(path: Path) -> dict | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(note, dict) and isinstance(note.get("sha256"), str) and isinstance(note.get("parts"), list)
        return note if whole else None
    except (OSError, ValueError):
        return None


def _survey(path: Path) -> dict:
    """The manifest's SHA-256 and, for each part, its first line's number, where it begins, and its bytes."""
    digest, parts, first, offset = hashlib.sha256(), [], 1, 0
    with path.open("rb") as file:
        while data := file.read(PART_BYTES) + file.readline():
            digest.update(data)
            parts.append([first, offset, len(data)])
            first, offset = first + data.count(b"\n"), offset + len(data)
    return {"sha256": digest.hexdigest(), "parts": parts}
