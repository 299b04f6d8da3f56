"""From documents' lengths to batches of packed rows. `pack` alone packs lengths, without configuration or files.

index (lengths of every document) -> mixture (one stream) -> packer (rows, steps) -> rows (decoded, by
workers) -> batch (arrays, and which context shard gets which tokens)
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.packing.packer import LOOK_AHEAD, OPEN_BINS, Packer
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout

__all__ = ["pack"]


def pack(
    lengths: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    budgets: int | Sequence[int] | np.ndarray,
    *,
    open_bins: int = OPEN_BINS,
    look_ahead: int = LOOK_AHEAD,
) -> list[list[int]]:
    """Packs documents into rows under one budget or several.

    A row is full where any of its budgets is. Documents are taken in order and may wait a little, so that rows become
    full; the same lengths give the same rows.

    Args:
        lengths: (n,), how long each document is, or (n, k), what it takes of each of k budgets, such as tokens and
            patches. Whole numbers, at least 0.
        budgets: what a row holds: one number, or k of them.
        open_bins: how many rows are filled at once.
        look_ahead: how many documents wait for a row; more make rows fuller, and take longer.

    Returns:
        The rows, each a list of places in `lengths`; every document is in one of them.

    Raises:
        ValueError: arrays whose shapes do not belong together, or a document that is longer than an empty row.

    >>> pack([60, 70, 25, 33, 12, 15, 30], 100, open_bins=2, look_ahead=3)
    [[0, 2, 5], [1, 4], [3, 6]]
    >>> pack([[10, 64], [20, 0], [30, 96], [5, 0]], [40, 128])  # tokens and patches
    [[0, 1, 3], [2]]
    """
    lengths, limits = np.asarray(lengths), np.atleast_1d(np.asarray(budgets))
    lengths = lengths.reshape(-1, 1) if lengths.ndim == 1 else lengths
    if lengths.ndim != 2 or limits.ndim != 1 or (len(lengths) and lengths.shape[1] != len(limits)):
        raise ValueError(f"lengths of shape {np.shape(lengths)} do not go with {limits.size} budgets: (n, budgets)")
    # No documents have no number of budgets to check.
    if not len(lengths):
        return []
    if not np.issubdtype(lengths.dtype, np.integer) or not np.issubdtype(limits.dtype, np.integer) or lengths.min() < 0:
        raise ValueError("lengths and budgets are whole numbers, lengths of at least 0")
    if len(over := np.flatnonzero((lengths > limits).any(1))):
        raise ValueError(
            f"document {over[0]} takes {lengths[over[0]].tolist()}, more than a row holds: {limits.tolist()}"
        )
    # No images, so that any layout of patches holds them.
    packer = Packer(limits.tolist(), PatchLayout(0), open_bins, look_ahead)
    documents = (DocumentLengths(number, tuple(taken), []) for number, taken in enumerate(lengths.tolist()))
    rows = [row for document in documents if (row := packer.add(document))]
    while row := packer.finish():
        rows.append(row)
    return [[document.number for document in row] for row in rows]
