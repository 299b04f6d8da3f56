"""JSONL manifests: one document a line, `{"text": ..., "id": ..., "type": ...}`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import Document, SampleError


class ManifestLine(NamedTuple):
    """A line of a manifest: its number (from 1), the byte it starts at, and its document or why it holds none."""

    number: int
    offset: int
    document: Document | SampleError


@dataclass(frozen=True)
class LineRange:
    """Whole lines of the manifest at `path`: from line `first` (from 1) at byte `offset` on, `length` bytes.

    `name` is what documents and messages call the manifest; media paths will be taken from `root`.
    """

    path: Path
    name: str
    root: Path
    first: int
    offset: int
    length: int

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, offset, bytes) of each line that is not empty. Raises ConfigError when the file cannot be read."""
        end, offset, number = self.offset + self.length, self.offset, self.first
        with _opened(self.path) as file:
            file.seek(offset)
            while offset < end and (line := file.readline()):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
                number += 1

    def documents(self) -> Iterator[ManifestLine]:
        """The documents of these lines, in order."""
        for number, offset, line in self.lines():
            yield ManifestLine(number, offset, _read_line(line, number, self.name, self.root))


def split_manifest(path: Path, name: str, root: Path, size: int) -> Iterator[LineRange]:
    """Ranges of about `size` bytes that hold every line of a manifest once. Raises ConfigError as `read_manifest`."""
    first, offset = 1, 0
    with _opened(path) as file:
        while content := file.read(size):
            if not content.endswith(b"\n"):
                content += file.readline()
            yield LineRange(path, name, root, first, offset, len(content))
            first += content.count(b"\n")
            offset += len(content)


def read_manifest(path: str | Path, root: str | Path) -> Iterator[ManifestLine]:
    """The lines of the manifest at `root/path`, in order.

    `text` is required; `id` defaults to `<manifest without its ending>-<line>`, `type` to "". Lines count from 1; empty
    ones are passed over. Media paths will be taken from `root`. Raises ConfigError when the file cannot be opened.
    """
    file_path = Path(root) / path
    with _opened(file_path) as file:
        length = file.seek(0, 2)
    yield from LineRange(file_path, str(path), Path(root), 1, 0, length).documents()


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"manifest {path} cannot be read: {error.strerror}") from error


def _read_line(line: bytes, number: int, manifest: str, root: Path) -> Document | SampleError:
    try:
        return parse_line(line, number, manifest, root)
    except SampleError as error:
        return error


def parse_line(line: bytes, number: int, manifest: str, root: Path) -> Document:
    """The document of one manifest line. Raises SampleError `bad_json`."""
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{manifest}:{number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SampleError("bad_json", f"{manifest}:{number} is not an object but {type(values).__name__}")
    if not isinstance(values.get("text"), str):
        raise SampleError("bad_json", f'{manifest}:{number} has no "text"')
    for key in ("id", "type"):
        if not isinstance(values.get(key), str | int | float | None):
            raise SampleError("bad_json", f'{manifest}:{number}: "{key}" is no text but {type(values[key]).__name__}')
    identifier, kind = ("" if values.get(key) is None else str(values[key]) for key in ("id", "type"))
    identifier = identifier or f"{Path(manifest).with_suffix('')}-{number}"
    try:
        (identifier + kind).encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_json", f"{manifest}:{number}: id or type is not Unicode: {error.reason}") from error
    return Document(id=identifier, type=kind, text=values["text"], where=f"{manifest}:{number}", media=root)
