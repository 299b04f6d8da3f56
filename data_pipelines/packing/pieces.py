"""Pieces of documents beyond a budget: some of their turns, fewer frames of their videos, or chunks; measured as
documents."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int32, Int64

from data_pipelines.documents.document import Document
from data_pipelines.packing.columns import Columns, make_columns

WHOLE = (-1, -1)  # in the place of turns or of a span: all there is


@dataclass(frozen=True)
class Pieces:
    """k pieces, in the order of the documents they are of.

    `documents` are those documents' numbers; `turns` the first turn of a piece and the one after its last, -1 for all;
    `max_frames` what its videos are cut down to, 0 for none; `spans` the first item of a chunk and the one after its
    last, -1 for all. `left` has, for documents of which something stays beyond
    a budget, the sentence; `handled` counts documents by the policy that made them fit.
    """

    documents: Int64[np.ndarray, "k"]
    turns: Int32[np.ndarray, "k 2"]
    max_frames: Int32[np.ndarray, "k"]
    spans: Int32[np.ndarray, "k 2"]
    columns: Columns
    left: dict[int, str] = field(default_factory=dict)
    handled: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def rescued(self) -> int:
        """Documents of which nothing is lost."""
        return len(np.setdiff1d(self.documents, list(self.left)))

    def document(self, piece: int) -> int:
        return int(self.documents[piece])

    def for_document(self, document: int) -> range:
        """The pieces of a document."""
        return range(*np.searchsorted(self.documents, [document, document + 1]).tolist())

    def cut(self, piece: int, document: Document) -> Document:
        """The piece of `document`, which it is of."""
        turns, span = (tuple(pairs[piece].tolist()) for pairs in (self.turns, self.spans))
        parts = {"turns": None if turns == WHOLE else turns, "span": None if span == WHOLE else span}
        return replace(document, max_frames=int(self.max_frames[piece]), **parts)


_NO_PAIRS = np.zeros((0, 2), np.int32)
NO_PIECES = Pieces(np.zeros(0, np.int64), _NO_PAIRS, np.zeros(0, np.int32), _NO_PAIRS, make_columns([]))
