"""The first pass over the manifests: which documents there are, which are double, and about how large each one is.

Nothing is opened but the manifests; media are only looked up. What comes out decides which lines go into which shard,
so it depends on the files alone, not on how many processes looked.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, run_job
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import parse_line, plain_manifest, split_manifest
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference, MediaRoot, find_media

RANGE = 1 << 25  # bytes of manifest of one unit of planning


@dataclass(frozen=True)
class Manifest:
    """A manifest: the file, what documents and messages call it, where its media are, what its shards are called.

    `lines` is the file in which places are counted: another one where the manifest is compressed (`unpack`).
    """

    path: Path
    name: str
    root: MediaRoot
    shards: str
    lines: Path

    def state(self) -> list[int]:
        """Returns size and time of change. Raises ConfigError when the file is gone."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise ConfigError(f"manifest {self.name} cannot be read: {error.strerror}") from error
        return [status.st_size, status.st_mtime_ns]


def unpack(sources: Sequence[Manifest], folder: Path) -> list[Manifest]:
    """Unpacks what compressed manifests hold into files in `folder`; returns all of them. Raises ConfigError for one
    that cannot be read.
    """
    return [replace(source, lines=plain_manifest(source.path, source.name, folder)) for source in sources]


@dataclass(frozen=True)
class PlannedLines:
    """The n lines of one manifest that are not empty: number, first byte, and about how many bytes they take.

    `ids` and `contents` are 128-bit hashes: of the document's id (0 for a line that holds no document), and of the line
    together with size and time of change of the files it names.
    """

    numbers: Int64[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    ids: UInt64[np.ndarray, "n 2"]
    contents: UInt64[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.numbers)


_COLUMNS = ("numbers", "offsets", "sizes", "ids", "contents")


def plan_lines(sources: Sequence[Manifest], folder: Path, runner: Runner) -> list[PlannedLines]:
    """Lists the lines of each manifest. `folder` holds what is known until it is done, and is then removed.

    Raises ConfigError when a manifest cannot be read, or changes meanwhile.
    """
    # Ranges of equal size: a manifest of any length is planned by all processes together.
    units, owners = [], []
    for owner, source in enumerate(sources):
        fingerprint = f"{source.path} {source.name} {source.root} {source.state()} {RANGE}"
        for lines in split_manifest(source.lines, source.name, source.root, RANGE):
            units.append(Unit(f"plan-{len(units):05d}", f"{fingerprint} {lines.offset}", lines, lines.length))
            owners.append(owner)
    job = Job("planning", units, _plan_range, folder)
    run_job(job, runner)
    # Joined in the order of the file, whoever was done first.
    parts: list[list[dict]] = [[_empty()] for _ in sources]
    for owner, unit in zip(owners, units, strict=True):
        with np.load(folder / f"{unit.name}.npz") as arrays:
            parts[owner].append({name: arrays[name] for name in _COLUMNS})
    shutil.rmtree(folder)
    return [PlannedLines(**{name: np.concatenate([part[name] for part in own]) for name in _COLUMNS}) for own in parts]


def _plan_range(unit: Unit, folder: Path) -> dict:
    """Does the work on one range of lines: writes its columns."""
    lines, rows = unit.content, []
    for number, offset, line in lines.lines():
        try:
            document = parse_line(line, number, lines.name, lines.root)
        except SampleError:
            rows.append((number, offset, len(line), bytes(16), _hash(line)))
            continue
        # Media are looked up, not read: a change of size or time means that the line's shard is outdated.
        size, state = _look_up(document)
        rows.append((number, offset, len(line) + size, _hash(document.id.encode()), _hash(line + state.encode())))
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    arrays = {name: np.array(column, np.int64) for name, column in zip(_COLUMNS[:3], columns[:3], strict=True)}
    arrays |= {name: _hashes(column) for name, column in zip(_COLUMNS[3:], columns[3:], strict=True)}
    # Any: the stubs take a mapping for savez' own options too.
    np.savez(folder / f"{unit.name}.npz", **cast(dict[str, Any], arrays))
    return {"lines": len(rows)}


def _look_up(document: Document) -> tuple[int, str]:
    """Returns the bytes of the media that stand in files, and by what a change of these files is noticed."""
    try:
        elements = parse_prompt(document.text)
    except SampleError:
        return 0, ""
    # base64 media are in the line already, whose bytes count anyway.
    size, states = 0, []
    for element in elements:
        if not isinstance(element, TextElement) and element.reference.path:
            found, state = _file_state(element.reference, document)
            size += found
            states.append(state)
    return size, "\n".join(states)


def _file_state(reference: MediaReference, document: Document) -> tuple[int, str]:
    try:
        path = find_media(reference, document.media).path
        if path is None:  # not of a manifest: its media are files
            return 0, ""
        status = os.stat(path)
    except SampleError as error:
        return 0, error.cause
    except OSError as error:
        return 0, str(error.errno)
    return status.st_size, f"{reference.path} {status.st_size} {status.st_mtime_ns}"


def _hash(content: bytes) -> bytes:
    """Never 16 zeros, which mean that there is no id."""
    return hashlib.blake2b(content, digest_size=16).digest()


def _hashes(digests: Sequence[bytes]) -> UInt64[np.ndarray, "n 2"]:
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def _empty() -> dict:
    return {name: np.zeros(0, np.int64) for name in _COLUMNS[:3]} | {name: _hashes([]) for name in _COLUMNS[3:]}


def first_of_same_id(ids: UInt64[np.ndarray, "n 2"]) -> tuple[Bool[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns which documents have the id of an earlier one, and the number of the first with its id for every one.

    >>> first_of_same_id(np.array([[1, 2], [3, 4], [1, 2], [0, 0], [0, 0]], np.uint64))
    (array([False, False,  True, False, False]), array([0, 1, 0, 3, 4]))
    """
    numbers = np.arange(len(ids))
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of the same ids the first comes first
    # Of a run of equal ids the first row begins it; a row without an id (zeros) always begins its own.
    ordered = ids[order]
    begins = np.ones(len(ids), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1) | ~ordered[1:].any(1)
    first = np.empty(len(ids), np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(ids) else order
    return first != numbers, first
