"""Reading a built dataset: `dataset.json` and the shards that it names.

DIR/dataset.json                   schema, shards with their documents, bytes and SHA-256, fingerprint, and counts
DIR/documents-00000.array_record   one record a document (record.py)
"""

import hashlib
import json
import logging
import math
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import PATIENCE, is_url, open_patiently, parse_path, patiently, write_json
from baichuan_omni_jax.storage.cache import FileCache, list_files
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.location import Media

log = logging.getLogger(__name__)

RECORD_SCHEMA = 1  # raise it when a record holds something else than before
_LENGTH = struct.Struct("<I")


def pack_document(document: Document, media: Mapping[str, bytes]) -> bytes:
    """Packs the record of `document`, whose text refers to `media` by name. The same document gives the same bytes."""
    header = {
        "schema": RECORD_SCHEMA,
        "id": document.id,
        "type": document.type,
        "text": document.text,
        "where": document.location,
        "media": [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in media.items()],
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *media.values()])


def unpack_document(record: bytes, where: str) -> Document:
    """Unpacks the document of a record, its media in memory. `where` names the record in messages.

    Raises SampleError "bad_record" when it is damaged or of another schema.
    """
    try:
        # The header first: it says how many bytes follow for each medium.
        (length,) = _LENGTH.unpack_from(record)
        header = json.loads(record[_LENGTH.size : _LENGTH.size + length])
        if header["schema"] != RECORD_SCHEMA:
            raise SampleError(
                "bad_record", f"{where} has schema {header['schema']}; this program reads {RECORD_SCHEMA}"
            )
        # Media are slices of the record; that they end where it ends shows that none is cut.
        media, place = {}, _LENGTH.size + length
        for name, size, digest in header["media"]:
            media[name] = Media(name, None, record[place : place + size], digest)
            place += size
        if place != len(record):
            raise SampleError("bad_record", f"{where} has {len(record)} bytes where its header says {place}")
        return Document(header["id"], header["type"], header["text"], header["where"], media)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        reason = f"its header lacks {error}" if isinstance(error, KeyError) else plain_reason(error)
        raise SampleError("bad_record", f"{where} is damaged: {reason}") from error


SUFFIX = ".array_record"
# A group is read and decompressed as a whole, so each document has its own: one random read costs one document. What
# zstd cannot make smaller (nearly all media) is stored as it is. The same records give the same bytes.
OPTIONS = "group_size:1,zstd:3"


class ShardWriter:
    """Writes documents to a new file at `path`, in order; a context manager. `documents` counts them.

    The file is whole after `close`. Raises OSError when the disk does not take it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.documents = 0
        with _io_errors(path):
            self._writer = ArrayRecordWriter(str(path), OPTIONS)

    def write(self, document: Document, media: Mapping[str, bytes]) -> None:
        """Adds `document`, whose text refers to `media` by name."""
        record = pack_document(document, media)
        with _io_errors(self.path):
            self._writer.write(record)
        self.documents += 1

    def close(self) -> None:
        """Writes what is left. Must be called; more than once does nothing."""
        if self._writer.is_open():
            with _io_errors(self.path):
                self._writer.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()


@contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    """Turns what ArrayRecord raises into OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


DATASET_FILE = "dataset.json"
DATASET_SCHEMA = 1  # of dataset.json: raise it when its fields mean something else than before
_BLOCK = 1 << 20
_CHECKED_SECONDS = 60.0  # a shard that could be read so long ago is not read from end to end again
OPEN_FILES = 64  # a process keeps so many files open; each holds 8 bytes a record in memory
# No read-ahead, no threads: documents are read one at a time, in any order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class ShardFile:
    """One ArrayRecord file of a dataset: its name, how many documents it holds, its size and SHA-256 (hex)."""

    file: str
    documents: int
    bytes: int
    sha256: str


class ShardedDataset:
    """The documents of a folder of shards, each a shard's number and a record's number, both from 0.

    Files are opened when they are first read. Picklable: a copy opens its own. Safe to read from several threads. What
    storage refuses is tried again for `patience` seconds, then a `StorageError`.
    """

    def __init__(
        self,
        folder: Path | epath.Path,
        shards: Sequence[ShardFile],
        fingerprint: str,
        patience: float = PATIENCE,
        cache: FileCache | None = None,
    ):
        """Shards of a folder that is a URL are read through `cache`. Raises StorageError where it does not answer."""
        self.folder, self._patience, self._cache = folder, patience, cache
        # Asked once, for all workers: what the bucket has, with sizes and checksums.
        self._files = {} if cache is None else list_files(folder, patience)
        self._checked: dict[int, float] = {}  # shard -> when all of it was read
        self.shards = tuple(shards)
        self.fingerprint = fingerprint
        # With the file's number: an evicted file that was fetched again is another one.
        self._readers: OrderedDict[int, tuple[ArrayRecordReader, int]] = OrderedDict()

    @property
    def remote(self) -> bool:
        """Whether shards have to be fetched."""
        return self._cache is not None

    def check_shards(self) -> None:
        """Raises ConfigError, naming the first, where a shard is not there; of a bucket also one of another size."""
        if self._cache is None:
            there: dict[str, int | None] = dict.fromkeys(
                patiently(lambda: os.listdir(self.folder), f"listing {self.folder}", self._patience)
            )
        else:
            there = {name: file.size for name, file in self._files.items()}
        for shard in self.shards:
            if shard.file not in there:
                raise ConfigError(f"{self.folder} lacks {shard.file}, which its {DATASET_FILE} names")
            size = there[shard.file]
            if size is not None and size != shard.bytes:
                raise ConfigError(f"{self.folder}/{shard.file} was not copied whole: {size} of {shard.bytes} bytes")
            if self._cache is not None and shard.bytes > self._cache.limit:
                raise ConfigError(f"{self.folder}/{shard.file} has {shard.bytes} bytes, more than data.cache_gb allows")
        total = sum(shard.bytes for shard in self.shards)
        if self._cache is not None and total > self._cache.limit:
            log.warning(
                "%s: its shards have %s bytes and data.cache_gb allows %s: in random order each is fetched often",
                *(self.folder, f"{total:,}", f"{self._cache.limit:,}"),
            )

    def fetch(self, shard: int) -> None:
        """Brings a shard to this machine, where it lies in a bucket."""
        with self._held(shard):
            pass

    def __len__(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def document(self, shard: int, record: int) -> Document:
        """Returns one document, its media in memory.

        Raises SampleError "bad_record" when the shard is cut, missing or damaged at that place; StorageError when
        storage refuses it; IndexError when it never held so many.
        """
        if not 0 <= record < self.shards[shard].documents:
            raise IndexError(f"{self.shards[shard].file} has no record {record}")
        where = f"{self._name(shard)} record {record}"
        with self._held(shard) as path:
            try:
                (content,) = self._reader(shard, path).read([record])
            except (RuntimeError, IndexError):
                # ArrayRecord does not tell wrong bytes from bytes that storage refused: a file that can be read from
                # end to end, and still lacks the record, is damaged.
                self._check_storage(shard, path)
                try:
                    (content,) = self._reader(shard, path).read([record])
                except (RuntimeError, IndexError) as error:
                    raise SampleError("bad_record", f"{where} is damaged: {plain_reason(error)}") from error
        return unpack_document(content, where)

    def documents_of(self, shard: int) -> Iterator[Document | SampleError]:
        """Yields the documents of a shard in order; in place of one that cannot be read, the error that `document`
        raises.
        """
        for record in range(self.shards[shard].documents):
            try:
                yield self.document(shard, record)
            except SampleError as error:
                yield error

    @contextmanager
    def _held(self, number: int) -> Iterator[Path]:
        """Gives a shard's file, which stays on this machine while the block runs."""
        name = self.shards[number].file
        if self._cache is None:
            yield Path(self.folder) / name
            return
        try:
            with self._cache.hold(self._files[name]) as path:
                yield path
        except (KeyError, FileNotFoundError) as error:
            raise StorageError(f"{self.folder}/{name} is not there any more") from error

    def _reader(self, shard: int, path: Path) -> ArrayRecordReader:
        reader, file = self._readers.get(shard, (None, 0))
        number = 0 if self._cache is None else path.stat().st_ino
        # A shard's file is opened when it is first read, and the one opened longest ago is let go of.
        if reader is None or file != number:
            reader, _ = self._readers[shard] = self._open(shard, path), number
            # Dropped, not closed: another thread may be reading from it.
            while len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)
        return reader

    def _name(self, number: int) -> str:
        """Returns what messages call a shard: by its folder's own name, not by where on this machine that lies."""
        folder = self.folder.name if self.remote else Path(self.folder).resolve().name
        return f"{folder}/{self.shards[number].file}"

    def _open(self, number: int, path: Path) -> ArrayRecordReader:
        shard, name = self.shards[number], self._name(number)
        try:
            found = patiently(path.stat, f"looking at {path}", self._patience).st_size
        except OSError as error:
            raise SampleError("bad_record", f"{name} cannot be read: {error.strerror}") from error
        # A cut file opens without an error and then holds no record; so does one that storage refused.
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.documents and found == shard.bytes:
            self._check_storage(number, path)
            reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.documents:
            size = f"it has {found} of {shard.bytes} bytes" if found != shard.bytes else "its index cannot be read"
            raise SampleError("bad_record", f"{name} is damaged: {size}")
        return reader

    def _check_storage(self, number: int, path: Path) -> None:
        """Reads a shard from end to end, and has it opened anew. Raises StorageError where storage refuses that."""
        self._readers.pop(number, None)
        # A shard with many damaged records is not read for each of them.
        if time.monotonic() - self._checked.get(number, -math.inf) < _CHECKED_SECONDS:
            return
        with open_patiently(path, self._patience) as file:
            while file.read(_BLOCK):
                pass
        self._checked[number] = time.monotonic()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": OrderedDict(), "_checked": {}}


def open_dataset(
    folder: str | Path | epath.Path, patience: float = PATIENCE, cache: FileCache | None = None
) -> ShardedDataset:
    """Opens the data set at `folder`; reads its `dataset.json`. Raises ConfigError when that is missing or of another
    form. What storage refuses is tried again for `patience` seconds; shards of a URL are read through `cache`.
    """
    description = read_description(folder, patience)
    shards = [ShardFile(**shard) for shard in description["shards"]]
    place = parse_path(folder) if is_url(folder) else Path(folder)
    return ShardedDataset(place, shards, description["fingerprint"], patience, cache)


def read_description(folder: str | Path | epath.Path, patience: float = PATIENCE) -> dict:
    """Reads all that `folder/dataset.json` holds. Raises ConfigError when it is not there or not of this form."""
    path = (parse_path(folder) if is_url(folder) else Path(folder)) / DATASET_FILE
    try:
        description = json.loads(patiently(path.read_bytes, f"reading {path}", patience))
        if description["schema"] != DATASET_SCHEMA:
            raise ConfigError(f"{path} has schema {description['schema']}; this program reads {DATASET_SCHEMA}")
        # A name with a folder in it would read, or later remove, what is not the data set's.
        files = [ShardFile(**shard).file for shard in description["shards"]]
        if outside := [file for file in files if Path(file).name != file]:
            raise ConfigError(f"{path} names a shard outside its folder: {outside[0]!r}")
        _ = description["fingerprint"]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} describes no dataset: {error}") from error
    return description


def write_description(folder: Path, shards: Sequence[ShardFile], details: dict) -> None:
    """Writes `folder/dataset.json`; `details` are what it holds besides the shards. Written last: it ends the build."""
    # Of the shards' digests: it changes with any byte of any document.
    digest = sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
    description = {
        "schema": DATASET_SCHEMA,
        "fingerprint": digest[:32],
        **details,
        "shards": [asdict(each) for each in shards],
    }
    write_json(folder / DATASET_FILE, description)
