"""One document as the bytes of one record: a JSON header, then the bytes of its media, each once.

    4 bytes     length of the header, little endian
    header      {"schema": 1, "id", "type", "text", "where", "media": [[name, length, SHA-256 in hex], ...]}
    media       in the order of the header

`text` refers to media by `name`; `where` is the manifest line that the document came from.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.location import Media

SCHEMA = 1  # raise it when a record holds something else than before
_LENGTH = struct.Struct("<I")


def pack_document(document: Document, media: Mapping[str, bytes]) -> bytes:
    """The record of `document`, whose text refers to `media` by name. The same document gives the same bytes."""
    header = {
        "schema": SCHEMA,
        "id": document.id,
        "type": document.type,
        "text": document.text,
        "where": document.where,
        "media": [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in media.items()],
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *media.values()])


def _why(error: Exception) -> str:
    return f"its header lacks {error}" if isinstance(error, KeyError) else plain_reason(error)


def unpack_document(record: bytes, where: str) -> Document:
    """The document of a record, its media in memory. `where` names the record in messages.

    Raises SampleError "bad_record" when it is damaged or of another schema.
    """
    try:
        (length,) = _LENGTH.unpack_from(record)
        header = json.loads(record[_LENGTH.size : _LENGTH.size + length])
        if header["schema"] != SCHEMA:
            raise SampleError("bad_record", f"{where} has schema {header['schema']}; this program reads {SCHEMA}")
        media, place = {}, _LENGTH.size + length
        for name, size, digest in header["media"]:
            media[name] = Media(name, None, record[place : place + size], digest)
            place += size
        if place != len(record):
            raise SampleError("bad_record", f"{where} has {len(record)} bytes where its header says {place}")
        return Document(header["id"], header["type"], header["text"], header["where"], media)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise SampleError("bad_record", f"{where} is damaged: {_why(error)}") from error


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
