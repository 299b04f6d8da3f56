"""What every document of a manifest takes of each budget, measured once from headers and cached.

The index is what mixture, shuffle and packing work on: rows are planned before anything is decoded. Documents that
cannot be used are in it too, with their cause, so that every manifest line ends up in a row or in a count.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from baichuan_omni_jax.config import Budgets, ConfigError
from data_pipelines.document import Document, Lengths, SampleError
from data_pipelines.manifest import parse_line, read_manifest
from data_pipelines.processor import Processor

BUDGETED = tuple(f.name for f in fields(Budgets))
COLUMNS = tuple(f.name for f in fields(Lengths))


@dataclass(frozen=True)
class Skipped:
    """A document that no row will hold: its manifest line, and why."""

    where: str
    cause: str
    message: str


@dataclass(frozen=True)
class Index:
    """One source's documents, n of them usable: lengths (n, columns) and the byte offset and number of each line."""

    name: str
    manifest: str
    root: Path
    lengths: Int32[np.ndarray, "n columns"]
    offsets: Int64[np.ndarray, "n"]
    lines: Int64[np.ndarray, "n"]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def document(self, number: int) -> Document:
        """The document `number`, read from its manifest line."""
        with open(self.root / self.manifest, "rb") as file:
            file.seek(int(self.offsets[number]))
            return parse_line(file.readline(), int(self.lines[number]), self.manifest, self.root)

    def needs(self, number: int) -> Int32[np.ndarray, "budgets"]:
        """What document `number` takes of the budgets, in the order of `Budgets`' fields."""
        return self.lengths[number, _BUDGET_COLUMNS]

    def within(self, budgets: Budgets) -> "Index":
        """The same index with documents larger than an empty row moved to `skipped` as `too_long`."""
        limit = np.array(astuple(budgets), np.int64)
        over = self.lengths[:, _BUDGET_COLUMNS] > limit
        fits = ~over.any(1)
        late = tuple(self._too_long(i, over[i], limit) for i in np.flatnonzero(~fits).tolist())
        kept = (self.lengths[fits], self.offsets[fits], self.lines[fits])
        return Index(self.name, self.manifest, self.root, *kept, self.skipped + late)

    def causes(self) -> Counter:
        """How many documents were skipped for each cause."""
        return Counter(item.cause for item in self.skipped)

    def _too_long(self, number: int, over: np.ndarray, limit: np.ndarray) -> Skipped:
        column = int(np.flatnonzero(over)[0])
        size = self.needs(number)[column]
        message = f"{size} {BUDGETED[column]} exceed the row's {limit[column]}"
        return Skipped(f"{self.manifest}:{self.lines[number]}", "too_long", message)


_BUDGET_COLUMNS = [COLUMNS.index(name) for name in BUDGETED]


def load_index(name: str, manifest: str, root: Path, processor: Processor, cache: Path) -> Index:
    """The index of `root/manifest`, from `cache` when manifest and processor are those it was built with, else built.

    Raises ConfigError when the manifest cannot be read.
    """
    try:
        content = (root / manifest).read_bytes()
    except OSError as error:
        raise ConfigError(f"source {name}: manifest {root / manifest} cannot be read: {error.strerror}") from error
    key = hashlib.sha256(processor.fingerprint.encode() + b"\0" + content).hexdigest()[:16]
    path = cache / f"{Path(manifest).stem}-{key}.npz"
    if not path.is_file():
        _store(path, *_measure_all(manifest, root, processor))
    with np.load(path) as arrays:
        skipped = tuple(Skipped(*item) for item in json.loads(str(arrays["skipped"])))
        return Index(name, manifest, root, arrays["lengths"], arrays["offsets"], arrays["lines"], skipped)


def _measure_all(manifest: str, root: Path, processor: Processor):
    lengths, offsets, lines, skipped = [], [], [], []
    for line in read_manifest(manifest, root):
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            lengths.append(astuple(processor.measure(line.document)))
        except SampleError as error:
            skipped.append((f"{manifest}:{line.number}", error.cause, str(error)))
            continue
        offsets.append(line.offset)
        lines.append(line.number)
    return (
        np.array(lengths, np.int32).reshape(-1, len(COLUMNS)),
        np.array(offsets, np.int64),
        np.array(lines, np.int64),
        skipped,
    )


def _store(path: Path, lengths, offsets, lines, skipped) -> None:
    """Written beside its place and renamed, so that a stopped build leaves no half index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.savez(file, lengths=lengths, offsets=offsets, lines=lines, skipped=json.dumps(skipped))
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
