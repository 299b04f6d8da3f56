"""The first pass over the manifests: which documents there are, how large each one is, which go into which shard.

Nothing is opened but the manifests; media are only looked up. What comes out depends on the files alone, not on how
many processes looked.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, run_job
from data_pipelines.datasets.shards import OPTIONS, RECORD_SCHEMA
from data_pipelines.datasets.sources import ANY_FOLDER, media_root, trusted_folders
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import LineRange, parse_line, plain_manifest, split_manifest
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.frame_tracks import QUALITY, FrameSpec
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


def list_sources(manifests: Sequence[Path], root: Path | None, trusted: Sequence[Path] = ANY_FOLDER) -> list[Manifest]:
    """Returns the manifests with the shortest names that tell them apart: paths from the folder that all of them are
    in.

    Media paths are relative to `root`, or to each manifest's folder; links may lead to the folders of `trusted`
    (`sources.media_root`). Raises ConfigError when one is given twice, or `root` or a trusted folder is no folder.
    """
    if root is not None and not root.expanduser().is_dir():
        raise ConfigError(f"--root {root} is no folder")
    folders = trusted_folders(trusted, "--trust")
    # The folder's own name, but not what a link there leads to: media stand beside the link.
    paths = [path.parent.resolve() / path.name for path in (path.expanduser() for path in manifests)]
    if doubles := [path for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"manifest {doubles[0]} is given twice")
    common = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(common).as_posix() for path in paths]
    found: list[Manifest] = []
    for path, name in zip(paths, names, strict=True):
        # Shards are files: a name is made of what every file system takes, and numbered where two become the same.
        stem = re.sub(r"[^\w.-]+", "-", re.sub(r"(\.jsonl)?(\.(gz|zst|zstd))?$", "", name))
        same = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", other.shards) is not None for other in found)
        media = media_root(path, root.expanduser() if root else None, folders)
        found.append(Manifest(path, name, media, f"{stem}~{same + 1}" if same else stem, path))
    return found


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
    empty = {name: np.zeros(0, np.int64) for name in _COLUMNS[:3]} | {name: _hashes([]) for name in _COLUMNS[3:]}
    parts: list[list[dict]] = [[empty] for _ in sources]
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


FORMAT = 2  # raise it when the same manifests and media give other shards than before


@dataclass(frozen=True)
class ShardLines:
    """What goes into one shard: lines of a source, those that double another document, the state of the manifest.

    `doubles` has the line's number and where the first document with its id is; `frames` says which frames are kept of
    videos (None: the whole files).
    """

    source: Manifest
    lines: LineRange
    doubles: Mapping[int, str]
    state: list[int]
    frames: FrameSpec | None = None


def cut_shards(
    sources: Sequence[Manifest],
    lines: Sequence[PlannedLines],
    documents: int,
    size: int,
    frames: FrameSpec | None = None,
) -> list[Unit]:
    """Cuts the lines of each manifest into shards: the units of the job.

    Args:
        sources: the manifests.
        lines: the lines of each.
        documents: the most documents of a shard.
        size: the most bytes, of manifest and media files as they are.
        frames: which frames are kept of videos; None: the whole files.

    Returns:
        A unit a shard, with a `ShardLines`.
    """
    kept = [] if frames is None else [str(frames), QUALITY]
    # Ids are unique over all manifests, so doubles are found over all of them together.
    double, first = first_of_same_id(np.concatenate([own.ids for own in lines]))
    starts = np.cumsum([0, *map(len, lines)])

    def where(document: int) -> str:
        owner = int(np.searchsorted(starts, document, "right")) - 1
        return f"{sources[owner].name}:{lines[owner].numbers[document - starts[owner]]}"

    units = []
    for source, own, start in zip(sources, lines, starts, strict=False):
        state = source.state()
        for number, (begin, end) in enumerate(_cuts(own.sizes, documents, size)):
            places = np.flatnonzero(double[start + begin : start + end]) + begin
            doubles = {int(own.numbers[place]): where(int(first[start + place])) for place in places}
            offset = int(own.offsets[begin])
            length = (int(own.offsets[end]) if end < len(own) else source.lines.stat().st_size) - offset
            lines_of = LineRange(source.lines, source.name, source.root, int(own.numbers[begin]), offset, length)
            # Everything that decides the shard's bytes: a shard is built again when, and only when, this changes.
            fingerprint = hashlib.sha256(
                json.dumps([FORMAT, RECORD_SCHEMA, OPTIONS, source.name, lines_of.first, doubles, *kept]).encode()
                + own.contents[begin:end].tobytes()
            )
            content = ShardLines(source, lines_of, doubles, state, frames)
            weight = int(own.sizes[begin:end].sum())
            units.append(Unit(f"{source.shards}-{number:05d}", fingerprint.hexdigest(), content, weight))
    return units


def _cuts(sizes: np.ndarray, documents: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts consecutive lines [begin, end): at most `documents`, and `size` bytes unless one line has more.

    >>> list(_cuts(np.array([3, 3, 3, 9, 1]), 3, 6))
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    # A shard ends where the next line would exceed the bytes or the count, whichever comes first.
    ends, begin = np.cumsum(sizes), 0
    while begin < len(sizes):
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + size, "right"))
        end = min(max(end, begin + 1), begin + documents, len(sizes))
        yield begin, end
        begin = end
