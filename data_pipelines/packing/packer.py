"""Which documents share a row: decided on lengths alone, nothing is decoded.

Packing over several budgets at once (`Packer`). Documents wait in a pool of fixed size. The one that has waited longest
goes into the fullest open row that has room for it, up to nine tenths of each budget. When none has, the fullest row is
topped up from the pool and emitted, and the document opens a new one. Topping up: while no two documents of the pool
fill what is left, the one is taken that uses most of the scarce budget and least of the others; then the two that fit
best. No document is cut, none waits for ever.

With rows of 100 tokens, two of them open, and a pool of 3 (documents by their size):

    open [60 25] [70]   pool 33 12 15 + 30    33 fits nowhere: [60 25] is topped up with 15, emitted; [33] is opened

"Fullest" and "scarce" mean the budget of which the documents so far took the largest share.

The row plan (`RowPlan`) gives one row after the other; `step_plan` makes steps of them. Its state is one small JSON
object that holds for all hosts: where each source is, and the keys of the documents that wait in the pool and in open
rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import add, le
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int64

from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout

if TYPE_CHECKING:  # `pack` is a door of its own: it reads no files, and neither should its import
    from data_pipelines.packing.mixture import Mixture

OPEN_BINS, LOOK_AHEAD = 8, 128  # rows open and documents waiting at once: the defaults of `DataConfig`
RESERVE = 0.1  # share of every budget that only topping up may use: what it has to choose from makes rows full
PATIENCE = 8  # a row is emitted before so many times `open_bins` others are, full or not
_CLOSE = 1 / 1024  # of a budget: two documents that leave less end the search


class _OpenRow:
    """A row being filled; `since` counts the rows emitted before it was opened."""

    def __init__(self, documents: list[DocumentLengths], since: int):
        self.documents, self.since = [], since
        self.used = [0] * len(documents[0].lengths)
        self.image_patches: list[int] = []
        for document in documents:
            self.add(document)

    def add(self, document: DocumentLengths) -> None:
        self.documents.append(document)
        self.used = list(map(add, self.used, document.lengths))
        self.image_patches += document.image_patches

    def has_room(self, document: DocumentLengths, limits: Sequence[int]) -> bool:
        return all(map(le, map(add, self.used, document.lengths), limits))


class Packer:
    """Takes documents one by one and gives rows of them. An empty row must hold each of them.

    Args:
        budgets: what a row holds, in the order of a document's `lengths`.
        layout: where a row's images lie; of one part it asks nothing of the packing.
        open_bins: how many rows are filled at once.
        look_ahead: how many documents wait in the pool.
    """

    def __init__(self, budgets: Sequence[int], layout: PatchLayout, open_bins: int, look_ahead: int):
        self._budgets = [int(budget) for budget in budgets]
        # Rows are filled up to here as documents come; the rest is for topping up, which can choose.
        self._limits = [int(budget * (1 - RESERVE)) for budget in self._budgets]
        self._layout, self._open_bins, self._look_ahead = layout, open_bins, look_ahead
        self._taken = [0] * len(self._budgets)
        self._emitted = 0
        self._pool: list[DocumentLengths] = []
        self._rows: list[_OpenRow] = []

    def add(self, document: DocumentLengths) -> list[DocumentLengths] | None:
        """Takes a document; returns a row when there is no room for it without emitting one."""
        # The counts that decide which budget is scarce: of all documents so far, packed or waiting.
        self._taken = list(map(add, self._taken, document.lengths))
        self._pool.append(document)
        return self._place(self._pool.pop(0)) if len(self._pool) > self._look_ahead else None

    def finish(self) -> list[DocumentLengths] | None:
        """Returns the next row when no document comes after; None when all are given."""
        while self._pool:
            row = self._place(self._pool.pop(0))
            if row is not None:
                return row
        return self._emit() if self._rows else None

    @property
    def state(self) -> dict:
        """JSON-ready: keys of the waiting documents and of each open row's, and a few counts."""
        return {
            "pool": [list(document.key) for document in self._pool],
            "open": [[list(document.key) for document in row.documents] for row in self._rows],
            "since": [row.since for row in self._rows],
            "taken": self._taken,
            "emitted": self._emitted,
        }

    def restore(self, state: dict, pool: list[DocumentLengths], rows: list[list[DocumentLengths]]) -> None:
        """Goes on where `state` was taken; `pool` and `rows` are the documents that it names."""
        self._pool = list(pool)
        self._rows = [_OpenRow(documents, since) for documents, since in zip(rows, state["since"], strict=True)]
        self._taken, self._emitted = list(state["taken"]), state["emitted"]

    def _place(self, document: DocumentLengths) -> list[DocumentLengths] | None:
        # First try the open rows, fullest first, so that rows close early and few stay open.
        scarce = self._scarce()
        for row in sorted(self._rows, key=lambda row: -row.used[scarce]):
            if row.has_room(document, self._limits) and self._images_fit(row, document.image_patches):
                row.add(document)
                return None
        # None has room: the document opens a row, for which another one may have to leave.
        emitted = self._emit() if len(self._rows) >= self._open_bins else None
        self._rows.append(_OpenRow([document], self._emitted))
        return emitted

    def _emit(self) -> list[DocumentLengths]:
        scarce, row = self._scarce(), self._rows[0]
        # The fullest row leaves, but none waits for ever.
        if self._emitted - row.since < PATIENCE * self._open_bins:  # rows are in the order in which they were opened
            row = max(self._rows, key=lambda row: row.used[scarce])
        self._rows.remove(row)
        self._emitted += 1
        self._top_up(row, scarce)
        return row.documents

    def _scarce(self) -> int:
        """Returns the budget that the documents so far took most of."""
        shares = [taken / budget if budget else 0 for taken, budget in zip(self._taken, self._budgets, strict=True)]
        return shares.index(max(shares))

    def _images_fit(self, row: _OpenRow, images: list[int]) -> bool:
        """Tells whether each image has a place; in one part all have that the budget has room for."""
        return not images or self._layout.parts == 1 or self._layout.fits(row.image_patches + images)

    def _top_up(self, row: _OpenRow, scarce: int) -> None:
        if not self._pool:
            return
        # The whole pool at once, as arrays: topping up looks at every pair of what waits.
        lengths = np.array([document.lengths for document in self._pool], np.int64)
        waiting = np.ones(len(lengths), bool)  # neither taken nor found to have no place for its images
        taken = set()
        while True:
            room = np.array(self._budgets) - row.used
            fits = np.flatnonzero(waiting & (lengths <= room).all(1))
            if not len(fits):
                break
            chosen = fits[_choose(lengths[fits], room, scarce, _CLOSE * self._budgets[scarce])].tolist()
            images = [self._pool[number].image_patches for number in chosen]
            # A choice whose images find no place is not tried again with its largest image.
            if self._images_fit(row, [size for sizes in images for size in sizes]):
                taken |= set(chosen)
                waiting[chosen] = False
                for number in chosen:
                    row.add(self._pool[number])
            else:
                waiting[max(chosen, key=lambda number: max(self._pool[number].image_patches, default=0))] = False
        self._pool = [document for number, document in enumerate(self._pool) if number not in taken]


def _choose(
    lengths: Int64[np.ndarray, "k budgets"], room: Int64[np.ndarray, "budgets"], scarce: int, close: float
) -> list[int]:
    """Chooses one or two of k documents, each of which fits the room: the best two (or one) if they leave less than
    `close`.
    """
    # The best pair; a document with itself (the diagonal) is that document alone.
    sizes = lengths[:, scarce]
    sums = np.where(_pairs_that_fit(lengths, room), sizes[:, None] + sizes, 0)
    np.fill_diagonal(sums, sizes)
    one, other = divmod(int(sums.argmax()), len(sizes))
    if room[scarce] - sums[one, other] <= close or len(sizes) <= 2:
        return sorted({one, other})
    # No pair ends the search: take what uses most of the scarce budget and least of the others.
    shares = lengths / np.maximum(room, 1)
    others = np.delete(shares, scarce, axis=1).max(1, initial=0)
    return [int((shares[:, scarce] - others).argmax())]


def _pairs_that_fit(
    lengths: Int64[np.ndarray, "k budgets"], room: Int64[np.ndarray, "budgets"]
) -> Bool[np.ndarray, "k k"]:
    fit = np.ones((len(lengths), len(lengths)), bool)
    # Budgets that any two documents fit need no table of pairs.
    for column in np.flatnonzero(2 * lengths.max(0) > room):
        fit &= lengths[:, column, None] + lengths[:, column] <= room[column]
    return fit


class RowPlan:
    """An iterator over rows, as lists of items, in the order in which they are packed."""

    def __init__(self, mixture: "Mixture", packer: Packer):
        self._mixture, self._packer = mixture, packer

    def __iter__(self) -> Iterator[list[DocumentLengths]]:
        return self

    def __next__(self) -> list[DocumentLengths]:
        """Returns the next row. A finite mixture ends with the rows that are still open."""
        while (document := self._mixture.next()) is not None:
            row = self._packer.add(document)
            if row is not None:
                return row
        row = self._packer.finish()
        if row is None:
            raise StopIteration
        return row

    @property
    def state(self) -> dict:
        return {"sources": self._mixture.state, "rows": self._packer.state}

    def restore(self, state: dict) -> None:
        """Goes on exactly where `state` was taken; reads the lengths of the documents it names."""
        self._mixture.restore(state["sources"])
        packed = state["rows"]
        self._packer.restore(packed, self.documents(packed["pool"]), [self.documents(row) for row in packed["open"]])

    def documents(self, keys: Iterable[Sequence[int]]) -> list[DocumentLengths]:
        """Looks up documents that were given before, by their keys in a state."""
        return [self._mixture.document((source, number)) for source, number in keys]


def check_plan(config: DataConfig) -> None:
    """Raises ConfigError naming a number of the row plan that cannot be."""
    for name, least in (("rows", 1), ("open_bins", 1), ("look_ahead", 0), ("order_window", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"data.{name} {getattr(config, name)} must be at least {least}")
    for name, size in vars(config.budgets).items():
        if size < (name == "tokens"):
            raise ConfigError(f"data.budgets.{name} {size} must be at least {int(name == 'tokens')}")
