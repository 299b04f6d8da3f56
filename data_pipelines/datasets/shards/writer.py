"""Writing a shard: one ArrayRecord file, one record a document."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.datasets.shards.record import pack_document
from data_pipelines.documents.document import Document

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
