"""One document as the bytes of one record: a JSON header, then the bytes of its media, each once.

    4 bytes     length of the header, little endian
    header      {"schema": 1, "id", "type", "text", "where", "media": [[name, length, SHA-256 in hex], ...]}
    media       in the order of the header

`text` refers to media by `name`; `where` is the manifest line that the document came from.
"""

import hashlib
import json
import struct
from collections.abc import Mapping

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
