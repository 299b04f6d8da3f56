"""Reading a built dataset: `dataset.json` and the shards that it names.

DIR/dataset.json                   schema, shards with their documents, bytes and SHA-256, fingerprint, and counts
DIR/documents-00000.array_record   one record a document (record.py)
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import write_json
from data_pipelines.datasets.shards.record import unpack_document
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import plain_reason

DATASET_FILE = "dataset.json"
SCHEMA = 1  # of dataset.json: raise it when its fields mean something else than before
OPEN_FILES = 64  # a process keeps so many files open; each holds 8 bytes a record in memory
# No read-ahead, no threads: documents are read one at a time, in any order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a dataset: its name, how many documents it holds, its size and SHA-256 (hex)."""

    file: str
    documents: int
    bytes: int
    sha256: str


class ShardedDataset:
    """The documents of a folder of shards, each a shard's number and a record's number, both from 0.

    Files are opened when they are first read. Picklable: a copy opens its own. Safe to read from several threads.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], fingerprint: str):
        self.folder = folder
        self.shards = tuple(shards)
        self.fingerprint = fingerprint
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()

    def __len__(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def document(self, shard: int, record: int) -> Document:
        """One document, its media in memory.

        Raises SampleError "bad_record" when the shard is cut, missing or damaged at that place; IndexError when it
        never held so many.
        """
        if not 0 <= record < self.shards[shard].documents:
            raise IndexError(f"{self.shards[shard].file} has no record {record}")
        where = f"{self._name(shard)} record {record}"
        reader = self._reader(shard)
        try:
            (content,) = reader.read([record])
        except (RuntimeError, IndexError) as error:
            raise SampleError("bad_record", f"{where} is damaged: {plain_reason(error)}") from error
        return unpack_document(content, where)

    def documents_of(self, shard: int) -> Iterator[Document | SampleError]:
        """The documents of a shard in order; in place of one that cannot be read, the error that `document` raises."""
        for record in range(self.shards[shard].documents):
            try:
                yield self.document(shard, record)
            except SampleError as error:
                yield error

    def _reader(self, shard: int) -> ArrayRecordReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = self._open(shard)
            # Dropped, not closed: another thread may be reading from it.
            while len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)
        return reader

    def _name(self, number: int) -> str:
        """What messages call a shard: by its folder's own name, not by where on this machine that lies."""
        return f"{self.folder.resolve().name}/{self.shards[number].file}"

    def _open(self, number: int) -> ArrayRecordReader:
        shard, name = self.shards[number], self._name(number)
        path = self.folder / shard.file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise SampleError("bad_record", f"{name} cannot be read: {error.strerror}") from error
        # A cut file opens without an error and then holds no record.
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.documents:
            size = f"it has {found} of {shard.bytes} bytes" if found != shard.bytes else "its index cannot be read"
            raise SampleError("bad_record", f"{name} is damaged: {size}")
        return reader

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": OrderedDict()}


def open_dataset(folder: str | Path) -> ShardedDataset:
    """The dataset at `folder`; reads its `dataset.json`. Raises ConfigError when that is missing or of another form."""
    description = read_description(folder)
    shards = [Shard(**shard) for shard in description["shards"]]
    return ShardedDataset(Path(folder), shards, description["fingerprint"])


def read_description(folder: str | Path) -> dict:
    """All that `folder/dataset.json` holds. Raises ConfigError when it is not there or not of this form."""
    path = Path(folder) / DATASET_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {description['schema']}; this program reads {SCHEMA}")
        files = [Shard(**shard).file for shard in description["shards"]]
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


def write_description(folder: Path, shards: Sequence[Shard], details: dict) -> None:
    """Writes `folder/dataset.json`; `details` are what it tells besides the shards. Written last: it ends the build."""
    digest = sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
    description = {"schema": SCHEMA, "fingerprint": digest[:32], **details, "shards": [asdict(each) for each in shards]}
    write_json(folder / DATASET_FILE, description)
