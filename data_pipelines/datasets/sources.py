"""Where documents come from: a JSONL manifest or a built data set, read in parts, or one document at a time."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from etils import epath

from baichuan_omni_jax.config import DataConfig, SourceConfig
from baichuan_omni_jax.errors import ConfigError, UnpreparedError
from baichuan_omni_jax.storage import PATIENCE, is_url, open_patiently, parse_path, write_json
from baichuan_omni_jax.storage.cache import FileCache
from data_pipelines.datasets.buckets import cache_folder, file_cache, manifest_copy
from data_pipelines.datasets.shards import DATASET_FILE, ShardedDataset, open_dataset, read_description
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import LineRange, manifest_stem, parse_line, plain_manifest
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaBucket, MediaFolder, MediaRoot

ANY_FOLDER = (Path("/"),)  # every link is trusted
PART_BYTES = 64 << 20  # of a manifest
_FETCHING = 16  # documents of a part whose media are being fetched at once


class Entry(NamedTuple):
    """One document of a source, or why it holds none. `place` (int64) and `number` (int32) find it again."""

    place: int
    number: int
    location: str
    document: Document | SampleError


@dataclass(frozen=True)
class Records:
    """A part of a built data set: one shard of `length` bytes."""

    shard: int
    length: int


class ManifestSource:
    """The manifest at `root/path`. A place is the byte at which a line begins, a number that of the line, from 1.

    Places count the bytes that a compressed manifest holds, so that compressing it changes neither index nor plan.
    """

    tokenizer = ""  # lines that hold token ids are checked one by one
    frames = ""  # videos are whole

    def __init__(self, path: str, root: Path, notes: Path, media: MediaFolder | None = None, media_key: str = ""):
        """`notes` is a folder where what a manifest's bytes gave is kept: they are read whole only when it changed.

        Media paths are taken from `media` (None: the manifest's folder, with no link that leaves it); `media_key` is
        what an index of this source depends on for that.
        """
        self.path, self.root, self._notes, self.media_key = path, root, notes, media_key
        self.media = media or MediaRoot((root / path).parent)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, of a compressed one of what it holds."""
        return self._survey["sha256"]

    @cached_property
    def parts(self) -> list[LineRange]:
        """Whole lines, about `PART_BYTES` each."""
        return [LineRange(self._lines, self.path, self.media, *numbers) for numbers in self._survey["parts"]]

    def entries(self) -> Iterator[Entry]:
        """Yields all documents, part after part."""
        for part in self.parts:
            yield from self.read(part)

    def read(self, part: LineRange) -> Iterator[Entry]:
        """Yields the documents of a part, passing over empty lines."""
        for line in part.documents():
            yield Entry(line.offset, line.number, self.location(line.offset, line.number), line.document)

    def document(self, place: int, number: int) -> Document:
        """Returns one document. Raises SampleError `bad_json` or `bad_form` when its line is no longer what it was."""
        # Opened anew each time: a worker reads few lines of a manifest, in any order.
        with open_patiently(self._lines, self.media.patience) as file:
            file.seek(place)
            return parse_line(file.readline(), number, self.path, self.media)

    def fetch(self, place: int, number: int) -> None:
        """Brings the media of a document to this machine, where they lie in a bucket."""
        if isinstance(self.media, MediaBucket):
            _fetch_media(self.document(place, number), self.media)

    @property
    def remote(self) -> bool:
        """Whether documents have to be fetched."""
        return isinstance(self.media, MediaBucket)

    def location(self, place: int, number: int) -> str:
        """Returns what messages call a document: manifest and line."""
        return f"{self.path}:{number}"

    @cached_property
    def _lines(self) -> Path:
        """The file in which places are counted."""
        path = self.root / self.path
        return plain_manifest(path, str(path), self._notes, self.media.patience)

    @cached_property
    def _survey(self) -> dict:
        path = (self.root / self.path).resolve()
        stem = Path(manifest_stem(path.name)).name
        note = self._notes / f"{stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.lines.json"
        # The note holds as long as size and time of change do: reading 10^9 lines for their digest takes minutes.
        known = _read_note(note)
        lines = self._lines
        try:
            status = path.stat()
            facts = {"path": str(path), "size": status.st_size, "changed": status.st_mtime_ns, "part": PART_BYTES}
            if known is not None and all(known.get(name) == value for name, value in facts.items()):
                return known
            known = facts | _survey(lines, self.media.patience)
        except OSError as error:
            raise ConfigError(f"manifest {self.root / self.path} cannot be read: {error.strerror}") from error
        write_json(note, known)
        return known


class DatasetSource:
    """The built data set in the folder `root/path`. A place is shard * 2^32 + record, a number that of the record."""

    media_key = ""  # media are in the shards

    def __init__(self, path: str, root: epath.Path | Path, patience: float = PATIENCE, cache: FileCache | None = None):
        """In a bucket shards are read through `cache`. Raises ConfigError for one that is missing."""
        self.path, self.root = path, root
        self._dataset: ShardedDataset = open_dataset(root / path, patience, cache)
        self._dataset.check_shards()
        description = read_description(root / path, patience)
        # Of the token ids that it holds; "" where it holds text.
        self.tokenizer: str = description.get("tokenizer", "")
        # Which frames it holds of videos (`FrameSpec`); "" where these are whole.
        self.frames: str = description.get("frames", "")

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    @property
    def parts(self) -> list[Records]:
        """One a shard."""
        return [Records(number, shard.bytes) for number, shard in enumerate(self._dataset.shards)]

    def entries(self) -> Iterator[Entry]:
        """Yields all documents, part after part."""
        for part in self.parts:
            yield from self.read(part)

    def read(self, part: Records) -> Iterator[Entry]:
        """Yields the documents of a shard."""
        for record, document in enumerate(self._dataset.documents_of(part.shard)):
            place = part.shard << 32 | record
            yield Entry(place, record, self.location(place, record), document)

    def document(self, place: int, number: int) -> Document:
        """Returns one document. Raises SampleError `bad_record` when its shard is damaged there."""
        return self._dataset.document(place >> 32, number)

    def fetch(self, place: int, number: int) -> None:
        """Brings the shard of a document to this machine, where it lies in a bucket."""
        self._dataset.fetch(place >> 32)

    @property
    def remote(self) -> bool:
        """Whether documents have to be fetched."""
        return self._dataset.remote

    def location(self, place: int, number: int) -> str:
        """Returns what messages call a document: shard and record."""
        return f"{self.path}/{self._dataset.shards[place >> 32].file}:{number}"


Source = ManifestSource | DatasetSource


def read_fetched(source: Source, part: LineRange | Records) -> Iterator[Entry]:
    """Yields the documents of a part; media files in a bucket are fetched side by side, ahead of their documents.

    A look into a bucket takes tens of milliseconds, however small the file: one after the other, a million pictures
    would take a day.
    """
    entries = source.read(cast(Any, part))  # a source reads its own kind of parts
    # A shard is one file, fetched when its first record is read.
    if not isinstance(source, ManifestSource) or not isinstance(source.media, MediaBucket):
        yield from entries
        return
    waiting: deque[tuple[Entry, Future | None]] = deque()
    pool = ThreadPoolExecutor(_FETCHING, "fetch")
    try:
        for entry in entries:
            document = entry.document
            usable = isinstance(document, Document)
            waiting.append((entry, pool.submit(_fetch_media, document, source.media) if usable else None))
            if len(waiting) > 4 * _FETCHING:
                yield _when_fetched(*waiting.popleft())
        while waiting:
            yield _when_fetched(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _when_fetched(entry: Entry, fetched: Future | None) -> Entry:
    # Waited for, so that reader and fetcher do not ask for one file at once. A failure is told to the reader.
    if fetched is not None:
        wait([fetched])
    return entry


def _fetch_media(document: Document, media: MediaBucket) -> None:
    for element in parse_prompt(document.text):
        if not isinstance(element, TextElement) and element.reference.path:
            media.fetch(element.reference.path)


def open_source(config: DataConfig, source: SourceConfig) -> Source:
    """Opens the built data set or the manifest that `source` names. Raises ConfigError for one that cannot be read."""
    root = parse_path(config.root)
    if is_url(root):
        return _open_in_bucket(config, source, root)
    root = Path(root)
    # A folder with `dataset.json` is a built data set; anything else is read as a manifest.
    if (root / source.manifest / DATASET_FILE).is_file():
        return DatasetSource(source.manifest, root, config.patience)
    trusted = trusted_folders(config.trusted_roots, "data.trusted_roots")
    folder = root / Path(source.root).expanduser() if source.root else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"its root {source.root} is no folder")
    media = media_root(root / source.manifest, folder, trusted, config.patience)
    # Not where the data lie: they may be moved.
    key = json.dumps([source.root, [str(each) for each in trusted]])
    return ManifestSource(source.manifest, root, cache_folder(config), media, key)


def _open_in_bucket(config: DataConfig, source: SourceConfig, root: epath.Path) -> Source:
    cache, place = file_cache(config), root / source.manifest
    try:
        cache.describe(f"{place}/{DATASET_FILE}")
        return DatasetSource(source.manifest, root, config.patience, cache)
    except FileNotFoundError:
        pass
    # A manifest is copied whole; its media are read one by one, through the cache.
    try:
        manifest = cache.describe(os.fspath(place))
    except FileNotFoundError as error:
        raise ConfigError(f"manifest {place} cannot be read: there is no such file, nor a data set") from error
    copy = manifest_copy(config, source.manifest, manifest)
    trusted = trusted_folders(config.trusted_roots, "data.trusted_roots")
    media = MediaBucket(os.fspath(root / source.root if source.root else place.parent), cache)
    # As for the same folder on a disk, so that both have one order and one index.
    key = json.dumps([source.root, [str(each) for each in trusted]])
    return ManifestSource(source.manifest, copy, cache_folder(config), media, key)


def media_root(manifest: Path, root: Path | None, trusted: Sequence[Path], patience: float = PATIENCE) -> MediaRoot:
    """Returns where the media of a manifest are: the one rule of all commands and runs.

    Paths are relative to `root` or, where that is None, to the folder that the manifest lies in; of a manifest that is
    a link to the folder of the link and, for what is not there, to that of the file it leads to. What storage refuses
    is tried again for `patience` seconds.
    """
    if root is not None:
        return MediaRoot(root.absolute(), tuple(trusted), patience=patience)
    # A link to a manifest means the folder of the link, and for what is missing there that of the file.
    folder = manifest.parent.absolute()
    target = manifest.resolve().parent
    return MediaRoot(folder, tuple(trusted), None if target == folder.resolve() else target, patience)


def trusted_folders(names: Sequence[str | Path], option: str) -> tuple[Path, ...]:
    """Returns the folders that links may lead to. Raises ConfigError, naming `option`, for one that is none."""
    folders = [Path(name).expanduser() for name in names]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{option} {missing[0]} is no folder")
    return tuple(folder.resolve() for folder in folders)


def _read_note(path: Path) -> dict | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(note, dict) and isinstance(note.get("sha256"), str) and isinstance(note.get("parts"), list)
        return note if whole else None
    except (OSError, ValueError):
        return None


def _survey(path: Path, patience: float) -> dict:
    """Returns the manifest's SHA-256 and, for each part, its first line's number, where it begins, and its bytes."""
    digest, parts, first, offset = hashlib.sha256(), [], 1, 0
    with open_patiently(path, patience) as file:
        # Whole lines: a part ends at the first line end behind `PART_BYTES`.
        while data := file.read(PART_BYTES) + file.readline():
            digest.update(data)
            parts.append([first, offset, len(data)])
            first, offset = first + data.count(b"\n"), offset + len(data)
    return {"sha256": digest.hexdigest(), "parts": parts}


def check_unprepared(config: DataConfig, sources: Sequence[Source], missing: str) -> None:
    """Raises UnpreparedError where the sources, which lack what is `missing`, are more than `max_unprepared_mb`."""
    size, limit = sum(part.length for source in sources for part in source.parts), config.max_unprepared_mb
    if 0 < limit < size / 1e6:
        names = ", ".join(dict.fromkeys(str(source.path) for source in sources))
        raise UnpreparedError(
            f"{names}: {size / 1e6:.0f} MB have no {missing} yet, and a start makes it for {limit} MB at most "
            f"(data.max_unprepared_mb)"
        )
