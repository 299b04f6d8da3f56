"""JSONL manifests: one document a line, `{"text": ..., "id": ..., "type": ...}`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import Document, SampleError


class ManifestLine(NamedTuple):
    """A line of a manifest: its number (from 1), the byte it starts at, and its document or why it holds none."""

    number: int
    offset: int
    document: Document | SampleError


def read_manifest(path: str | Path, root: str | Path) -> Iterator[ManifestLine]:
    """The lines of the manifest at `root/path`, in order.

    `text` is required; `id` defaults to `<manifest's stem>-<line>`, `type` to "". Lines count from 1; empty ones are
    passed over. Media paths will be taken from `root`. Raises ConfigError when the file cannot be opened.
    """
    file_path = Path(root) / path
    try:
        file = file_path.open("rb")
    except OSError as error:
        raise ConfigError(f"manifest {file_path} cannot be read: {error.strerror}") from error
    offset = 0
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    document = parse_line(line, number, str(path), Path(root))
                except SampleError as error:
                    document = error
                yield ManifestLine(number, offset, document)
            offset += len(line)


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
    return Document(
        id=str(values.get("id") or f"{Path(manifest).stem}-{number}"),
        type=str(values.get("type") or ""),
        text=values["text"],
        where=f"{manifest}:{number}",
        media=root,
    )
