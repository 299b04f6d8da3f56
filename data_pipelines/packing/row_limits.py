"""What documents take of a row's budgets, and what an empty row holds: which documents exceed it, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from baichuan_omni_jax.config import Budgets
from data_pipelines.documents.document import Lengths
from data_pipelines.packing.media_layout import PatchLayout

DocumentKey = tuple[int, int]

BUDGETED = tuple(f.name for f in fields(Budgets))
_PATCHES, AUDIO_TARGETS = BUDGETED.index("patches"), BUDGETED.index("audio_targets")


class DocumentLengths(NamedTuple):
    """Holds what rows are planned from: the number of a document in its source, what it takes of each budget (tokens
    first), the patches of each of its images, how many text targets and audio frames to predict it has, and its source.
    """

    number: int
    lengths: tuple[int, ...]
    image_patches: list[int]
    trainable: int = 0
    source: int = 0

    @property
    def key(self) -> DocumentKey:
        """Names the document in the whole mixture: (source, number)."""
        return self.source, self.number


def budget_vector(budgets: Budgets) -> Int64[np.ndarray, "budgets"]:
    """Returns the budgets in the order of their fields; one that is left out is more than anything needs."""
    limits = budgets.limits()
    return np.array([limits.get(name, np.iinfo(np.int32).max) for name in BUDGETED], np.int64)


def budget_lengths(lengths: Lengths) -> list[int]:
    """Returns what a document takes of each budget, in the order of the budgets' fields."""
    return [getattr(lengths, name) for name in BUDGETED]


@dataclass(frozen=True)
class RowLimits:
    """The budgets of a row, its patches in `media_shards` equal parts of which each holds whole images."""

    budgets: Budgets
    media_shards: int = 1

    @property
    def layout(self) -> PatchLayout:
        return PatchLayout(self.budgets.patches, self.media_shards)

    def exceeds(
        self,
        lengths: Integer[np.ndarray, "n budgets"],
        images: Integer[np.ndarray, "m"],
        counts: Int64[np.ndarray, "n"],
    ) -> Bool[np.ndarray, "n"]:
        """Tells which of n documents an empty row cannot hold; `counts` of the m images are each document's,
        in order.
        """
        over = np.any(lengths > budget_vector(self.budgets), axis=1)
        layout, ends = self.layout, np.cumsum(counts)
        some = np.flatnonzero((counts > 0) & ~over)
        if not len(some) or layout.parts == 1:
            return over
        starts = ends - counts
        largest = np.zeros(len(lengths), np.int64)
        holding = np.flatnonzero(counts)
        # The largest image of each document that has any.
        largest[holding] = np.maximum.reduceat(images, starts[holding])
        over |= largest > layout.room
        # An image finds every part too full only when each holds more than `room - largest`.
        safe = (counts <= layout.parts) | (lengths[:, _PATCHES] <= layout.parts * (layout.room - largest))
        for document in np.flatnonzero(~over & ~safe).tolist():
            over[document] = not layout.fits(images[starts[document] : ends[document]].tolist())
        return over

    def why_exceeds(self, lengths: Sequence[int] | Int32[np.ndarray, "budgets"], images: Sequence[int]) -> str:
        """Says why an empty row cannot hold a document; "" when it can."""
        for name, size, limit in zip(BUDGETED, lengths, budget_vector(self.budgets), strict=True):
            if size > limit:
                return f"{size} {name} exceed the row's {limit}"
        layout = self.layout
        if layout.fits(images):
            return ""
        # The budgets hold it: then it is the images, which find no part.
        largest = int(np.argmax(images))
        parts = f"the row's {layout.parts} parts (data.media_shards) of {layout.room} patches"
        if images[largest] > layout.room:
            size = images[largest]
            return f"image {largest + 1} of the document has {size} patches, too many for one of {parts}"
        return f"the document's {len(images)} images of up to {images[largest]} patches do not all fit {parts}"
