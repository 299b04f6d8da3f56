"""Reading a built dataset: `dataset.json` and the shards that it names.

DIR/dataset.json                   schema, shards with their documents, bytes and SHA-256, fingerprint, and counts
DIR/documents-00000.array_record   one record a document (record.py)
"""

import hashlib
import json
import math
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

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import PATIENCE, open_patiently, patiently, write_json
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.location import Media

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

    def __init__(self, folder: Path, shards: Sequence[ShardFile], fingerprint: str, patience: float = PATIENCE):
        self.folder, self._patience = folder, patience
        self._checked: dict[int, float] = {}  # shard -> when all of it was read
        self.shards = tuple(shards)
        self.fingerprint = fingerprint
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()

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
        try:
            (content,) = self._reader(shard).read([record])
        except (RuntimeError, IndexError):
            # ArrayRecord does not tell wrong bytes from bytes that storage refused: a file that can be read from end to
            # end, and still lacks the record, is damaged.
            self._check_storage(shard)
            try:
                (content,) = self._reader(shard).read([record])
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

    def _reader(self, shard: int) -> ArrayRecordReader:
        reader = self._readers.get(shard)
        # A shard's file is opened when it is first read, and the one opened longest ago is let go of.
        if reader is None:
            reader = self._readers[shard] = self._open(shard)
            # Dropped, not closed: another thread may be reading from it.
            while len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)
        return reader

    def _name(self, number: int) -> str:
        """Returns what messages call a shard: by its folder's own name, not by where on this machine that lies."""
        return f"{self.folder.resolve().name}/{self.shards[number].file}"

    def _open(self, number: int) -> ArrayRecordReader:
        shard, name = self.shards[number], self._name(number)
        path = self.folder / shard.file
        try:
            found = patiently(path.stat, f"looking at {path}", self._patience).st_size
        except OSError as error:
            raise SampleError("bad_record", f"{name} cannot be read: {error.strerror}") from error
        # A cut file opens without an error and then holds no record; so does one that storage refused.
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.documents and found == shard.bytes:
            self._check_storage(number)
            reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.documents:
            size = f"it has {found} of {shard.bytes} bytes" if found != shard.bytes else "its index cannot be read"
            raise SampleError("bad_record", f"{name} is damaged: {size}")
        return reader

    def _check_storage(self, number: int) -> None:
        """Reads a shard from end to end, and has it opened anew. Raises StorageError where storage refuses that."""
        self._readers.pop(number, None)
        # A shard with many damaged records is not read for each of them.
        if time.monotonic() - self._checked.get(number, -math.inf) < _CHECKED_SECONDS:
            return
        with open_patiently(self.folder / self.shards[number].file, self._patience) as file:
            while file.read(_BLOCK):
                pass
        self._checked[number] = time.monotonic()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": OrderedDict(), "_checked": {}}


def open_dataset(folder: str | Path, patience: float = PATIENCE) -> ShardedDataset:
    """Opens the data set at `folder`; reads its `dataset.json`. Raises ConfigError when that is missing or of another
    form. What storage refuses is tried again for `patience` seconds.
    """
    description = read_description(folder, patience)
    shards = [ShardFile(**shard) for shard in description["shards"]]
    return ShardedDataset(Path(folder), shards, description["fingerprint"], patience)


def read_description(folder: str | Path, patience: float = PATIENCE) -> dict:
    """Reads all that `folder/dataset.json` holds. Raises ConfigError when it is not there or not of this form."""
    path = Path(folder) / DATASET_FILE
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
