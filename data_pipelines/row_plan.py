"""Which documents share a row: packing over several budgets at once, decided on lengths alone.

Some rows are kept open. A document goes into the fullest open row that still has room for it in every budget; when
none has, the fullest row is emitted and a new one opened. No document is cut. With rows of 10 tokens, two of them open:

    documents 6 5 3 4 7    ->  [6 3] open, [5 4] open; 7 fits nowhere, both hold 9: the first is emitted, [7] opened
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np
from jaxtyping import Int

from data_pipelines.mixture import DocumentKey

Row = list[DocumentKey]


class RowPlan:
    """An iterator over rows of document keys. Its whole state is the place in the stream and the open rows."""

    def __init__(
        self,
        stream: grain.MapDataset,
        needs: Callable[[int, int], Int[np.ndarray, "budgets"]],
        budgets: Int[np.ndarray, "budgets"] | Sequence[int],
        open_bins: int,
    ):
        """`needs(source, document)` gives what a document takes of each budget; it must fit an empty row."""
        self._stream, self._needs = stream, needs
        self._budgets = np.asarray(budgets, np.int64)
        self._open_bins = open_bins
        self._place = 0
        self._rows: list[Row] = []
        self._used = np.zeros((0, len(self._budgets)), np.int64)

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
        need = self._needs(*key)
        fits = (self._used + need <= self._budgets).all(1)
        if fits.any():
            fullest = int(np.argmax(np.where(fits, self._used[:, 0], -1)))
            self._rows[fullest].append(key)
            self._used[fullest] += need
            return None
        emitted = self._emit() if len(self._rows) >= self._open_bins else None
        self._rows.append([key])
        self._used = np.vstack([self._used, need])
        return emitted

    def _emit(self) -> Row:
        fullest = int(np.argmax(self._used[:, 0]))
        self._used = np.delete(self._used, fullest, axis=0)
        return self._rows.pop(fullest)
