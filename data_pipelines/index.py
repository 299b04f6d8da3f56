"""What every document of a manifest takes of each budget, measured once from headers and cached.

The index is what mixture, shuffle and packing work on: rows are planned before anything is decoded. Documents that
cannot be used are in it too, with their cause, so that every manifest line ends up in a row or in a count.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from baichuan_omni_jax.config import Budgets, ConfigError
from data_pipelines.document import Document, Lengths, SampleError
from data_pipelines.manifest import parse_line, read_manifest
from data_pipelines.media_layout import PatchLayout
from data_pipelines.processor import Processor

BUDGETED = tuple(f.name for f in fields(Budgets))
COLUMNS = tuple(f.name for f in fields(Lengths) if f.name != "pictures")
FORMAT = 2  # of cached indexes: raise it when they hold something else than before


@dataclass(frozen=True)
class Skipped:
    """A document that no row will hold: its manifest line, and why."""

    where: str
    cause: str
    message: str


@dataclass(frozen=True)
class Index:
    """One source's documents, n of them usable: lengths (n, columns) and the byte offset and number of each line.

    `pictures` has the patches of each of their m pictures and video frames, document after document: document i's
    begin at `picture_places[i]` and end before `picture_places[i + 1]`.
    """

    name: str
    manifest: str
    root: Path
    lengths: Int32[np.ndarray, "n columns"]
    offsets: Int64[np.ndarray, "n"]
    lines: Int64[np.ndarray, "n"]
    pictures: Int32[np.ndarray, "m"]
    picture_places: Int64[np.ndarray, "n+1"]
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

    def pictures_of(self, number: int) -> list[int]:
        """Patches of each picture and video frame of document `number`, in order."""
        return self.pictures[slice(*self.picture_places[number : number + 2])].tolist()

    def within(self, budgets: Budgets, media_shards: int = 1) -> "Index":
        """The same index with documents that an empty row cannot hold moved to `skipped` as `too_long`.

        A row's patches lie in `media_shards` equal parts, and each picture must fit one of them.
        """
        limit, layout = budget_vector(budgets), PatchLayout(budgets.patches, media_shards)
        over = self.lengths[:, _BUDGET_COLUMNS] > limit
        misplaced = ~over.any(1) & self._misplaced(layout)
        fits = ~over.any(1) & ~misplaced
        messages = {i: self._too_long(i, over[i], limit) for i in np.flatnonzero(over.any(1)).tolist()}
        messages |= {i: self._too_broad(i, layout) for i in np.flatnonzero(misplaced).tolist()}
        late = tuple(Skipped(f"{self.manifest}:{self.lines[i]}", "too_long", messages[i]) for i in sorted(messages))
        counts = np.diff(self.picture_places)
        return replace(
            self,
            lengths=self.lengths[fits],
            offsets=self.offsets[fits],
            lines=self.lines[fits],
            pictures=self.pictures[np.repeat(fits, counts)],
            picture_places=_places(counts[fits]),
            skipped=self.skipped + late,
        )

    def causes(self) -> Counter:
        """How many documents were skipped for each cause."""
        return Counter(item.cause for item in self.skipped)

    def _misplaced(self, layout: PatchLayout) -> Bool[np.ndarray, "n"]:
        """Which documents' pictures have no place in an empty row of this layout."""
        counts = np.diff(self.picture_places)
        largest = np.zeros(len(self), np.int64)
        np.maximum.at(largest, np.repeat(np.arange(len(self)), counts), self.pictures)
        misplaced = largest > layout.room
        # A picture finds every part too full only when each holds more than `room - largest`.
        patches = self.lengths[:, COLUMNS.index("patches")]
        safe = (counts <= layout.parts) | (patches <= layout.parts * (layout.room - largest))
        for number in np.flatnonzero(~misplaced & ~safe).tolist():
            misplaced[number] = not layout.fits(self.pictures_of(number))
        return misplaced

    def _too_long(self, number: int, over: np.ndarray, limit: np.ndarray) -> str:
        column = int(np.flatnonzero(over)[0])
        size = self.needs(number)[column]
        return f"{size} {BUDGETED[column]} exceed the row's {limit[column]}"

    def _too_broad(self, number: int, layout: PatchLayout) -> str:
        sizes = self.pictures_of(number)
        largest = int(np.argmax(sizes))
        parts = f"the row's {layout.parts} parts (data.media_shards) of {layout.room} patches"
        if sizes[largest] > layout.room:
            return f"picture {largest + 1} of the document has {sizes[largest]} patches, too many for one of {parts}"
        return f"the document's {len(sizes)} pictures of up to {sizes[largest]} patches do not all fit {parts}"


_BUDGET_COLUMNS = [COLUMNS.index(name) for name in BUDGETED]


def budget_vector(budgets: Budgets) -> Int64[np.ndarray, "budgets"]:
    """The budgets in the order of their fields; one that is left out is more than anything needs."""
    limits = budgets.limits()
    return np.array([limits.get(name, np.iinfo(np.int32).max) for name in BUDGETED], np.int64)


def _places(counts: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n+1"]:
    """Where each document's pictures begin, and where the last one's end."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def load_index(name: str, manifest: str, root: Path, processor: Processor, cache: Path) -> Index:
    """The index of `root/manifest`, from `cache` when manifest and processor are those it was built with, else built.

    Raises ConfigError when the manifest cannot be read.
    """
    try:
        content = (root / manifest).read_bytes()
    except OSError as error:
        raise ConfigError(f"source {name}: manifest {root / manifest} cannot be read: {error.strerror}") from error
    key = hashlib.sha256(f"{FORMAT} {processor.fingerprint}\0".encode() + content).hexdigest()[:16]
    path = cache / f"{Path(manifest).stem}-{key}.npz"
    if not path.is_file():
        _store(path, **_measure_all(manifest, root, processor))
    with np.load(path) as arrays:
        skipped = tuple(Skipped(*item) for item in json.loads(str(arrays["skipped"])))
        return Index(name, manifest, root, **{key: arrays[key] for key in _ARRAYS}, skipped=skipped)


_ARRAYS = ("lengths", "offsets", "lines", "pictures", "picture_places")


def _measure_all(manifest: str, root: Path, processor: Processor) -> dict:
    """`Index`'s arrays, and its `skipped` as JSON."""
    measured, offsets, lines, skipped = [], [], [], []
    for line in read_manifest(manifest, root):
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            measured.append(processor.measure(line.document))
        except SampleError as error:
            skipped.append((f"{manifest}:{line.number}", error.cause, str(error)))
            continue
        offsets.append(line.offset)
        lines.append(line.number)
    lengths = [[getattr(document, name) for name in COLUMNS] for document in measured]
    return {
        "lengths": np.array(lengths, np.int32).reshape(-1, len(COLUMNS)),
        "offsets": np.array(offsets, np.int64),
        "lines": np.array(lines, np.int64),
        "pictures": np.array([size for document in measured for size in document.pictures], np.int32),
        "picture_places": _places(np.array([len(document.pictures) for document in measured], np.int64)),
        "skipped": json.dumps(skipped),
    }


def _store(path: Path, **content) -> None:
    """Written beside its place and renamed, so that a stopped build leaves no half index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.savez(file, **content)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
