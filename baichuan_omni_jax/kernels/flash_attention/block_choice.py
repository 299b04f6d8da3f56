"""Which blocks attention is planned by: those that visit the least, by the lengths of the documents in a run's rows.

Small blocks follow the diagonal and the borders of documents closely; large ones spread what every visit costs over
more. Rows of one 64k document are best served by 512 x 1024 (queries x keys), rows of documents of 1k tokens by 256 x
256. Only the TPU kernels are meant: the others cut blocks into tiles of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A visit's own cost in (query, key) pairs of tokens: prologue, epilogue and the grid's step, read off libtpu's schedule
# for v5p with 7 heads a step (about 650 of 9,350 bundles at 512 x 512).
VISIT_COST = 18_000
# A pair of tokens where the mask is applied, beside one where it is not: 9,910 bundles to 9,351.
MASKED_COST = 1.06
CANDIDATES = ((256, 256), (256, 512), (512, 512), (512, 1024))
DEFAULT = (512, 512)
USUAL = {"cpu": 256, "gpu": 128}  # where blocks are not chosen: as measured; by the compiled kernels


class BlockChoice(NamedTuple):
    """Blocks of `block_q` x `block_kv` tokens, and what they visit for each pair of tokens that is visible."""

    block_q: int
    block_kv: int
    visited: float


def choose_blocks(rows: Sequence[Sequence[int]], length: int) -> BlockChoice:
    """Chooses the blocks that cost least for causal attention over rows of packed documents.

    Args:
        rows: lengths in tokens of each row's documents, in order; the rest of a row is padding.
        length: tokens of a row. Blocks that do not divide it are left out.

    Returns:
        The best candidate; 512 x 512 where there is no document.

    >>> choose_blocks([[65536]], 65536)[:2], choose_blocks([[1000] * 65], 65536)[:2]
    ((512, 1024), (256, 256))
    """
    pairs = sum(size * (size + 1) // 2 for row in rows for size in row)
    if not pairs:
        return BlockChoice(DEFAULT[0], DEFAULT[1], 1.0)
    found = {}
    for block_q, block_kv in CANDIDATES:
        if length % block_q == length % block_kv == 0:
            visits, interior = np.sum([_count_visits(row, block_q, block_kv) for row in rows], axis=0)
            area = block_q * block_kv
            cost = visits * VISIT_COST + area * (interior + MASKED_COST * (visits - interior))
            found[block_q, block_kv] = (cost, visits * area / pairs)
    if not found:
        return BlockChoice(DEFAULT[0], DEFAULT[1], 1.0)
    block_q, block_kv = min(found, key=lambda blocks: found[blocks][0])
    return BlockChoice(block_q, block_kv, float(found[block_q, block_kv][1]))


def _count_visits(sizes: Sequence[int], block_q: int, block_kv: int) -> tuple[int, int]:
    """Counts the pairs of blocks that a row visits, and those of them that need no mask."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    first = np.arange(0, ends[-1] if len(ends) else 0, block_q)  # token of each block of queries
    last = np.minimum(first + block_q, ends[-1] if len(ends) else 0) - 1
    # Its queries see from the beginning of the first one's document to the last query itself, one stretch of keys.
    begins = starts[np.searchsorted(ends, first, "right")]
    visits = (last // block_kv - begins // block_kv + 1).sum()
    # Without a mask: blocks of one document, all of whose keys lie before all queries.
    alone = begins == starts[np.searchsorted(ends, last, "right")]
    whole = first // block_kv - -(-begins // block_kv)
    return int(visits), int(np.where(alone & (last == first + block_q - 1), np.maximum(whole, 0), 0).sum())
