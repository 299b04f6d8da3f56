"""JSONL manifests: one document a line, `{"text": ..., "id": ..., "type": ...}`."""

import json
from collections.abc import Iterator
from pathlib import Path

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import Document, SampleError


def read_manifest(path: str | Path, root: str | Path) -> Iterator[Document | tuple[int, SampleError]]:
    """The documents of the manifest at `root/path`, in order; a line that is none gives its number and why.

    `text` is required; `id` defaults to `<manifest's stem>-<line>`, `type` to "". Lines count from 1; empty ones are
    passed over. Media paths will be taken from `root`. Raises ConfigError when the file cannot be opened.
    """
    file_path = Path(root) / path
    try:
        file = file_path.open("rb")
    except OSError as error:
        raise ConfigError(f"manifest {file_path} cannot be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _read_line(line, number, str(path), Path(root))
                except SampleError as error:
                    yield number, error


def _read_line(line: bytes, number: int, manifest: str, root: Path) -> Document:
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
        root=root,
        manifest=manifest,
        line=number,
    )
