"""Which documents share a row: packing over several budgets at once, decided on lengths alone.

Some rows are kept open. A document goes into the fullest open row that still has room for it in every budget, and a
whole place for each of its pictures; when none has, the fullest row is emitted and a new one opened. No document is
cut. With rows of 10 tokens, two of them open:

    documents 6 5 3 4 7    ->  [6 3] open, [5 4] open; 7 fits nowhere, both hold 9: the first is emitted, [7] opened
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np
from jaxtyping import Int

from data_pipelines.media_layout import PatchLayout
from data_pipelines.mixture import DocumentKey

Row = list[DocumentKey]


class RowPlan:
    """An iterator over rows of document keys. Its whole state is the place in the stream and the open rows."""

    def __init__(
        self,
        stream: grain.MapDataset,
        needs: Callable[[int, int], Int[np.ndarray, "budgets"]],
        pictures: Callable[[int, int], list[int]],
        budgets: Int[np.ndarray, "budgets"] | Sequence[int],
        layout: PatchLayout,
        open_bins: int,
    ):
        """`needs(source, document)` gives what a document takes of each budget, `pictures` the patches of each of its
        pictures; an empty row must hold them.
        """
        self._stream, self._needs, self._pictures = stream, needs, pictures
        self._budgets = np.asarray(budgets, np.int64)
        self._layout = layout
        self._open_bins = open_bins
        self._place = 0
        self._rows: list[Row] = []
        self._used = np.zeros((0, len(self._budgets)), np.int64)
        self._sizes: list[list[int]] = []  # of each open row's pictures

    @property
    def state(self) -> dict:
        """JSON-ready: the next place in the stream and the documents of each open row."""
        return {"place": self._place, "open": [[list(key) for key in row] for row in self._rows]}

    def restore(self, state: dict) -> None:
        """Goes on exactly where `state` was taken; reads no document."""
        self._place = state["place"]
        self._rows = [[(source, number) for source, number in row] for row in state["open"]]
        used = [sum((self._needs(*key) for key in row), np.zeros_like(self._budgets)) for row in self._rows]
        self._used = np.array(used, np.int64).reshape(-1, len(self._budgets))
        self._sizes = [[size for key in row for size in self._pictures(*key)] for row in self._rows]

    def __iter__(self) -> "RowPlan":
        return self

    def __next__(self) -> Row:
        """The next row. A finite stream ends by emitting its open rows, fullest first."""
        while self._place < len(self._stream):
            key = self._stream[self._place]
            self._place += 1
            emitted = self._add(key)
            if emitted is not None:
                return emitted
        if self._rows:
            return self._emit()
        raise StopIteration

    def _add(self, key: DocumentKey) -> Row | None:
        need, sizes = self._needs(*key), self._pictures(*key)
        for row in self._with_room(need):
            if not sizes or self._layout.fits(self._sizes[row] + sizes):
                self._rows[row].append(key)
                self._used[row] += need
                self._sizes[row] += sizes
                return None
        emitted = self._emit() if len(self._rows) >= self._open_bins else None
        self._rows.append([key])
        self._used = np.vstack([self._used, need])
        self._sizes.append(list(sizes))
        return emitted

    def _with_room(self, need: Int[np.ndarray, "budgets"]) -> list[int]:
        """Open rows with room in every budget, the fullest first."""
        fits = np.flatnonzero((self._used + need <= self._budgets).all(1))
        return fits[np.argsort(-self._used[fits, 0], kind="stable")].tolist()

    def _emit(self) -> Row:
        fullest = int(np.argmax(self._used[:, 0]))
        self._used = np.delete(self._used, fullest, axis=0)
        del self._sizes[fullest]
        return self._rows.pop(fullest)
