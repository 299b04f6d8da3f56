"""An index's numbers as columns on disk: memory-mapped, so that many processes share them and none holds them.

48 bytes a document and 4 an image or video frame: 100 million documents with two images each are 5.6 GB.

    FOLDER/lengths.npy          (n, 7) int32    what each document takes of the budgets
    FOLDER/places.npy           (n,) int64      where its source has it
    FOLDER/numbers.npy          (n,) int32      its line or record
    FOLDER/image_patches.npy    (m,) int32      patches of each image and video frame, document after document
    FOLDER/image_offsets.npy   (n + 1,) int64  document i's begin at [i] and end before [i + 1]
    FOLDER/skipped.jsonl        [where, cause, message] of each document that cannot be used
    FOLDER/meta.json            counts and sizes; written last

Documents beyond a budget have pieces, measured as documents: some of their turns, fewer frames of their videos, or
chunks (`oversize`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from data_pipelines.documents.document import Document, Lengths
from data_pipelines.packing.row_limits import BUDGETED, budget_lengths

SKIPPED_FILE, META_FILE = "skipped.jsonl", "meta.json"
BYTES_PER_DOCUMENT = 4 * len(BUDGETED) + 8 + 4 + 8
BYTES_PER_IMAGE = 4
_DTYPES = {
    "lengths": np.int32,
    "places": np.int64,
    "numbers": np.int32,
    "image_patches": np.int32,
    "image_offsets": np.int64,
}
NAMES = tuple(_DTYPES)


@dataclass(frozen=True)
class Columns:
    """n documents with m images. Pickled as its folder where it has one."""

    lengths: Int32[np.ndarray, "n budgets"]  # what each document takes of the budgets
    places: Int64[np.ndarray, "n"]  # where its source has it
    numbers: Int32[np.ndarray, "n"]  # its line or record
    image_patches: Int32[np.ndarray, "m"]  # of all images, document after document
    image_offsets: Int64[np.ndarray, "n+1"]  # document i's begin at [i] and end before [i + 1]
    folder: Path | None = None  # where the columns are mapped from; None: they are in memory
    meta: dict = field(default_factory=dict)  # counts, causes of skipped documents, digest

    def __len__(self) -> int:
        return len(self.lengths)

    def patches_of(self, document: int) -> list[int]:
        """Returns the patches of each image and video frame of a document, in order."""
        return self.image_patches[slice(*self.image_offsets[document : document + 2])].tolist()

    def __reduce__(self):
        return (open_columns, (self.folder,)) if self.folder else (Columns, tuple(getattr(self, n) for n in NAMES))


def make_columns(
    lengths: Sequence[Lengths], places: Sequence[int] | None = None, numbers: Sequence[int] | None = None
) -> Columns:
    """Makes columns in memory of documents with these lengths; without places and numbers they count from 0."""
    count = range(len(lengths))
    return Columns(
        np.array([budget_lengths(each) for each in lengths], np.int32).reshape(-1, len(BUDGETED)),
        np.array(count if places is None else places, np.int64),
        np.array(count if numbers is None else numbers, np.int32),
        np.array([size for each in lengths for size in each.image_patches], np.int32),
        np.cumsum([0, *(len(each.image_patches) for each in lengths)]).astype(np.int64),
    )


def write_columns(columns: Columns, folder: Path, prefix: str = "") -> None:
    """Writes each column as a file of its own."""
    for name in NAMES:
        np.save(folder / f"{prefix}{name}.npy", getattr(columns, name))


def open_columns(folder: Path) -> Columns:
    """Opens the columns in `folder`, memory-mapped. Raises ValueError or OSError for what is missing or damaged."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        counts = {name: meta["documents"] for name in NAMES}
        counts |= {"image_patches": meta["images"], "image_offsets": meta["documents"] + 1}
        if (folder / SKIPPED_FILE).stat().st_size != meta["skipped_bytes"]:
            raise ValueError(f"{folder / SKIPPED_FILE} is cut")
        arrays = {name: _open(folder / f"{name}.npy", _DTYPES[name], count) for name, count in counts.items()}
    except (KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return Columns(**arrays, folder=folder, meta=meta)


def _open(path: Path, dtype: type, count: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r" if count else None)  # an empty array cannot be mapped
    if array.dtype != dtype or len(array) != count:
        raise ValueError(f"{path} holds {array.shape} {array.dtype}")
    return array


class ColumnsWriter:
    """Puts columns one after the other into a folder, without holding more than one of them."""

    def __init__(self, folder: Path, documents: int, images: int):
        self._counts = {"documents": documents, "images": images}
        self._folder, self._at, self._images_at = folder, 0, 0
        shapes = {name: (documents,) for name in NAMES}
        shapes |= {"lengths": (documents, len(BUDGETED)), "image_patches": (images,), "image_offsets": (documents + 1,)}
        for name, shape in shapes.items():
            if not shape[0]:
                np.save(folder / f"{name}.npy", np.zeros(shape, _DTYPES[name]))
        make = lambda name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", _DTYPES[name], shapes[name])  # noqa: E731
        self._arrays = {name: make(name) for name, shape in shapes.items() if shape[0]}

    def add(self, folder: Path, prefix: str) -> None:
        """Appends columns that `write_columns` wrote."""
        part = {name: np.load(folder / f"{prefix}{name}.npy") for name in NAMES}
        documents, images = len(part["lengths"]), len(part["image_patches"])
        for name, array in part.items():
            start = self._images_at if name == "image_patches" else self._at
            if len(array):
                # Offsets of a part begin at 0: they move behind the images of the parts before.
                values = array + self._images_at if name == "image_offsets" else array
                self._arrays[name][start : start + len(array)] = values
        self._at, self._images_at = self._at + documents, self._images_at + images

    def close(self, meta: dict) -> None:
        """Brings everything to disk, `meta` last."""
        for array in self._arrays.values():
            array.flush()
        meta = self._counts | {"skipped_bytes": (self._folder / SKIPPED_FILE).stat().st_size} | meta
        (self._folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")


WHOLE = (-1, -1)  # in the place of turns or of a span: all there is


@dataclass(frozen=True)
class Pieces:
    """k pieces of documents beyond a budget, in the order of these documents."""

    documents: Int64[np.ndarray, "k"]  # numbers of the documents they are of
    turns: Int32[np.ndarray, "k 2"]  # a piece's first turn and the one after its last; -1: all
    max_frames: Int32[np.ndarray, "k"]  # what its videos are cut down to; 0: as they are
    spans: Int32[np.ndarray, "k 2"]  # first item of a chunk and the one after its last; -1: all
    columns: Columns  # lengths of the pieces
    left: dict[int, str] = field(default_factory=dict)  # document -> why something of it stays beyond a budget
    handled: Counter = field(default_factory=Counter)  # documents by the policy that made them fit

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def rescued(self) -> int:
        """Documents of which nothing is lost."""
        return len(np.setdiff1d(self.documents, list(self.left)))

    def document(self, piece: int) -> int:
        return int(self.documents[piece])

    def for_document(self, document: int) -> range:
        """Returns the pieces of a document."""
        return range(*np.searchsorted(self.documents, [document, document + 1]).tolist())

    def cut(self, piece: int, document: Document) -> Document:
        """Cuts the piece out of `document`, which it is of."""
        turns, span = (tuple(pairs[piece].tolist()) for pairs in (self.turns, self.spans))
        parts = {"turns": None if turns == WHOLE else turns, "span": None if span == WHOLE else span}
        return replace(document, max_frames=int(self.max_frames[piece]), **parts)


_NO_PAIRS = np.zeros((0, 2), np.int32)
NO_PIECES = Pieces(np.zeros(0, np.int64), _NO_PAIRS, np.zeros(0, np.int32), _NO_PAIRS, make_columns([]))
