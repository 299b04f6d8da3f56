"""JSONL manifests, plain, gzip or zstd: one document a line, `{"text": ..., "id": ..., "type": ...}`."""

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import PATIENCE, open_patiently
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import HEAD, is_utf16, kind_of
from data_pipelines.media.location import MediaFolder, MediaRoot

_BOM = b"\xef\xbb\xbf"
_COMPRESSED = (".gz", ".zst", ".zstd")


class ManifestLine(NamedTuple):
    """A line of a manifest: its number (from 1), the byte it starts at, and its document or why it holds none."""

    number: int
    offset: int
    document: Document | SampleError


@dataclass(frozen=True)
class LineRange:
    """Whole lines of the manifest at `path`: from line `first` (from 1) at byte `offset` on, `length` bytes.

    Bytes are counted in what a compressed manifest holds. `name` is what documents and messages call the manifest;
    media paths will be taken from `root`.
    """

    path: Path
    name: str
    root: MediaFolder
    first: int
    offset: int
    length: int

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Yields (number, offset, bytes) of each line that is not empty. Raises ConfigError when the file cannot be
        read.
        """
        end, offset, number = self.offset + self.length, self.offset, self.first
        # Of a compressed manifest seeking reads forward; ranges come in ascending order.
        with open_manifest(self.path, self.name) as file:
            file.seek(offset)
            while offset < end and (line := file.readline()):
                if not is_blank(line):
                    yield number, offset, line
                offset += len(line)
                number += 1

    def documents(self) -> Iterator[ManifestLine]:
        """Yields the documents of these lines, in order."""
        for number, offset, line in self.lines():
            yield ManifestLine(number, offset, _read_line(line, number, self.name, self.root))


def split_manifest(path: Path, name: str, root: MediaFolder, size: int) -> Iterator[LineRange]:
    """Yields ranges that hold every line of a manifest once.

    Args:
        path: the manifest, plain or compressed.
        name: what documents and messages call it.
        root: what media paths will be taken from.
        size: bytes of a range, about; a line is never cut.

    Raises:
        ConfigError: as `read_manifest`.
    """
    first, offset = 1, 0
    with open_manifest(path, name) as file:
        while content := file.read(size):
            # A range ends with the line it is in: ranges are then worked on by whoever takes them.
            if not content.endswith(b"\n"):
                content += file.readline()
            yield LineRange(path, name, root, first, offset, len(content))
            first += content.count(b"\n")
            offset += len(content)


def read_manifest(path: str | Path, root: str | Path, media: MediaFolder | None = None) -> Iterator[ManifestLine]:
    """Yields the lines of the manifest at `root/path`, in order.

    `text` is required; `id` defaults to `<manifest without its endings>-<line>`, `type` to "". Lines count from 1;
    empty ones are passed over. Media paths will be taken from `media`, or from the manifest's folder, which trusts no
    link that leaves it. Raises ConfigError when the file cannot be read, is damaged, or is no text in UTF-8.
    """
    file_path = Path(root) / path
    media = media or MediaRoot(file_path.parent)
    yield from LineRange(file_path, str(path), media, 1, 0, sys.maxsize).documents()


def manifest_stem(name: str) -> str:
    """Returns the manifest's name without its endings: documents have the same ids where it is compressed.

    >>> [manifest_stem(name) for name in ("sub/m.jsonl", "m.jsonl.gz", "m.v2.jsonl.zst")]
    ['sub/m', 'm', 'm.v2']
    """
    path = Path(name)
    if path.suffix.lower() in _COMPRESSED and path.stem:
        path = path.with_suffix("")
    return str(path.with_suffix(""))


def plain_manifest(path: Path, name: str, folder: Path, patience: float = PATIENCE) -> Path:
    """Returns `path` itself or, of a compressed manifest, a file in `folder` with what it holds, for reading at any
    byte.

    Written once for each state of the manifest, and there only when it is whole. Raises ConfigError as `read_manifest`;
    OSError where the copy cannot be written; StorageError.
    """
    with open_manifest(path, name, patience) as file:
        status = path.stat()
        with open_patiently(path, patience) as packed:
            if not _compression(packed.read(4)):
                return path
        # A manifest that changed gets another copy: one that is being read stays.
        key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
        copy = folder / f"{Path(manifest_stem(path.name)).name}-{key}.lines"
        if copy.is_file():
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        # Other processes, perhaps of other hosts, may be writing the same one.
        partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex[:12]}.partial")
        # Written beside it and renamed, so that nobody reads half of it.
        try:
            with partial.open("xb") as target:
                shutil.copyfileobj(file, target, 1 << 20)
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy


@contextmanager
def open_manifest(path: Path, name: str = "", patience: float = PATIENCE) -> Iterator[io.BufferedIOBase]:
    """Opens a manifest as a stream of bytes, of a compressed one what it holds. Seeking forward works for all.

    `name` is what messages call it; a read that storage refuses is tried again for `patience` seconds. Raises
    ConfigError when it cannot be opened, is damaged (also while it is read), is UTF-16 or a file of another kind;
    StorageError.
    """
    name = name or path.name
    try:
        file = open_patiently(path, patience)
    except OSError as error:
        raise ConfigError(f"manifest {name} cannot be read: {error.strerror}") from error
    with file:
        # The first bytes are peeked at, so that pipes and archives are opened once.
        # What decides is the content, not the ending.
        compression = _compression(file.peek(4)[:4])
        try:
            if compression == "gzip":
                plain = gzip.GzipFile(fileobj=file)
            else:
                plain = io.BufferedReader(_ZstdStream(file, name), 1 << 16) if compression else file
            _check_text(plain.peek(HEAD)[:HEAD], name)
            yield plain
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
            raise ConfigError(f"manifest {name} is damaged: its {compression} data are cut or changed") from error


def _compression(head: bytes) -> Literal["", "gzip", "zstd"]:
    # By content: downloads often lose their endings.
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # A frame, or one of those that parallel compressors put before it and readers pass over.
    skipped = head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    return "zstd" if skipped or head[:4] == b"\x28\xb5\x2f\xfd" else ""


def _check_text(head: bytes, name: str) -> None:
    if is_utf16(head):
        raise ConfigError(f"manifest {name} is a text in UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    found = kind_of(head) if head else None
    if found is not None and found.name not in ("a text", "a text of JSON"):
        raise ConfigError(f"manifest {name} is {found.name}, not lines of JSON, plain or compressed by gzip or zstd")


class _ZstdError(Exception):
    """The compressed data end within a frame, or are none."""


class _ZstdStream(io.RawIOBase):
    """What the frames of a zstd file hold, one after the other. Seeks forward only."""

    _INPUT = 2048  # bytes a time: they may hold 2**16 times as much

    def __init__(self, file: io.BufferedReader, name: str):
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f"manifest {name} is compressed by zstd: pip install zstandard") from error
        self._file, self._error = file, zstandard.ZstdError
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._frame: Any = None  # the one under way
        self._left, self._place = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._place:
            raise io.UnsupportedOperation("a zstd file is read forward")
        # Forward by reading: there is no table of where what is compressed lies.
        while self._place < offset and self.read(min(offset - self._place, 1 << 20)):
            pass
        return self._place

    def readinto(self, buffer: Any) -> int:
        # A frame may give nothing for a while: a reader takes no bytes for the end.
        while not self._left and self._decode():
            pass
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        self._place += count
        return count

    def _decode(self) -> bool:
        """Decodes the next bytes of the file into `_left`, perhaps none; False at the end."""
        data = self._file.read(self._INPUT)
        if not data:
            if self._frame is not None:
                raise _ZstdError
            return False
        try:
            # Frames follow each other without a gap; a new one begins where the last one ended.
            while data:
                self._frame = self._frame or self._new()
                self._left += self._frame.decompress(data)
                data, done = self._frame.unused_data, self._frame.eof
                self._frame = None if done else self._frame
        except self._error as error:
            raise _ZstdError from error
        return True


def is_blank(line: bytes) -> bool:
    """Tells whether a line holds nothing, not counting byte order marks, which joined files have anywhere."""
    return not _content(line)


def _content(line: bytes) -> bytes:
    line = line.strip()
    while line.startswith(_BOM):
        line = line[len(_BOM) :].lstrip()
    return line


def _read_line(line: bytes, number: int, manifest: str, root: MediaFolder) -> Document | SampleError:
    try:
        return parse_line(line, number, manifest, root)
    except SampleError as error:
        return error


def parse_line(line: bytes, number: int, manifest: str, root: MediaFolder) -> Document:
    """Reads the document of one manifest line.

    Args:
        line: its bytes, in UTF-8.
        number: its place in the manifest, from 1.
        manifest: what documents and messages call the manifest.
        root: what media paths are taken from.

    Returns:
        The document; `id` defaults to the manifest's name and the number.

    Raises:
        SampleError: `bad_json` for what is no JSON, `bad_form` for JSON that is no document of our form.
    """
    where = f"{manifest}:{number}"
    # Stage 1: JSON of any form; what is none says why in the words of whoever wrote it.
    content = _content(line)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{where} is not JSON: {_why_no_json(content, error)}") from error
    # Stage 2: an object with a text; forms of other programs are called by their name.
    if not isinstance(values, dict):
        raise SampleError("bad_form", f'{where} is {_json_name(values)}, not an object with "text"')
    if "text" not in values:
        raise SampleError("bad_form", f'{where} has no "text"{_other_form(values)}')
    if not isinstance(values["text"], str):
        raise SampleError("bad_form", f'{where}: "text" is {_json_name(values["text"])}, not a text')
    for key in ("id", "type"):
        if not isinstance(values.get(key), str | int | float | None):
            raise SampleError("bad_form", f'{where}: "{key}" is {_json_name(values[key])}, not a text')
    # Stage 3: numbers are taken for ids and types, as spreadsheets write them.
    identifier, kind = ("" if values.get(key) is None else str(values[key]) for key in ("id", "type"))
    identifier = identifier or f"{manifest_stem(manifest)}-{number}"
    try:
        (identifier + kind).encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_form", f"{where}: id or type is not Unicode: {error.reason}") from error
    return Document(id=identifier, type=kind, text=values["text"], location=where, media=root)


def _why_no_json(content: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if content in (b"[", b"{"):
        return f"it ends after {content.decode()}: each document is one object on one line"
    if not isinstance(error, json.JSONDecodeError):
        return "a number has too many digits"
    if error.msg == "Extra data":
        return f"more follows after character {error.pos}: each document is one object on a line of its own"
    return f"{error.msg} at character {error.pos + 1}"


def _json_name(value: Any) -> str:
    """Returns what a value is called in JSON.

    >>> [_json_name(value) for value in ([], 1.5, True, None)]
    ['a list', 'a number', 'true', 'null']
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names[type(value)]


# Keys by which chats and pairs of other programs are known, and what to call such a line.
_OTHER_FORMS = {
    "messages": "a chat in OpenAI's form",
    "conversations": "a chat in ShareGPT's or LLaVA's form",
    "conversation": "a chat of another form",
    "instruction": "an instruction in Alpaca's form",
    "prompt": "a prompt and its completion",
    "question": "a question and its answer",
    "input": "a pair of input and output",
    "content": "a text of another form",
    "caption": "a caption of another form",
}


def _other_form(values: Mapping[str, Any]) -> str:
    """Returns what a line without "text" is: ' but "messages": a chat in OpenAI's form'."""
    for key, form in _OTHER_FORMS.items():
        if key in values:
            return f' but "{key}": {form}; write each document as one prompt'
    if not values:
        return ": it is empty"
    keys = ", ".join(f'"{key}"' for key in list(values)[:5])
    return f" but {keys if len(keys) <= 100 else keys[:97] + '...'}"
