"""What back ends share: segments, the plan of block pairs to visit, and the names of what a backward pass reads.

The plan is built once per row and used by every layer. A query sees a key when both have the same non-zero segment id
and, if causal, the key's position is not later. With blocks of 2 and two documents of 3 tokens, causal:

    token      0 1 2 3 4 5          key block   0   1   2
    id         1 1 1 2 2 2          query 0     x   .   .
    position   0 1 2 0 1 2          query 1     x   x   .     x: visited, 4 of 9 pairs
                                    query 2     .   x   x     (query 2 = ids 2 2, block 1 = ids 1 2)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int32

ATTENTION_OUT = "attention_out"
KV_GATHERED = "kv_gathered"


def named(out: Array, lse: Array) -> tuple[Array, Array]:
    """Returns output and log-sum-exp under the name that remat policies know.

    Named inside the derivative rule: what the backward kernels read is what is kept.
    """
    return checkpoint_name(out, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_OUT)


# A pair is one int32: query block, key block, three flags.
FIRST, LAST, INTERIOR = 1, 2, 4
_KEY_SHIFT, _QUERY_SHIFT, _BLOCK_MASK = 3, 16, (1 << 13) - 1
MAX_BLOCKS = 1 << 13
_LATE = jnp.iinfo(jnp.int32).max


class Segments(NamedTuple):
    """Holds segment ids and positions of queries (b, t) and keys (b, s), int32.

    Id 0 is padding: it neither sees nor is seen. Positions order the tokens of a segment, wherever they lie in the row.
    """

    q_ids: Int32[Array, "b t"]
    q_pos: Int32[Array, "b t"]
    kv_ids: Int32[Array, "b s"]
    kv_pos: Int32[Array, "b s"]

    @classmethod
    def from_row(cls, ids: Int32[Array, "b t"], positions: Int32[Array, "b t"]) -> "Segments":
        """Returns the segments of self-attention: queries and keys are the same tokens."""
        return cls(ids, positions, ids, positions)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["by_query", "by_key", "count"],
    meta_fields=["block_q", "block_kv", "causal"],
)
class BlockPlan:
    """Holds the pairs of blocks to visit, per row and context shard c, padded to the worst case N = query x key blocks.

    `by_query` (b, c, N) int32 is ordered by query block, `by_key` by key block; the first `count` (b, c) are visited.
    After them come, as pairs both FIRST and LAST, the blocks that see nothing, for kernels to clear; the rest has no
    flags. A pair holds (query block << 16 | key block << 3 | flags): FIRST and LAST of its query (by_query) or key
    block (by_key), INTERIOR where every pair of tokens is visible and the mask can be skipped.
    """

    def __init__(self, by_query: Array, by_key: Array, count: Array, *, block_q: int, block_kv: int, causal: bool):
        self.by_query, self.by_key, self.count = by_query, by_key, count
        self.block_q, self.block_kv, self.causal = block_q, block_kv, causal


def unpack(pair: Int32[Array, "..."]) -> tuple[Array, Array, Array]:
    """Returns (query block, key block, flags) of packed pairs."""
    return pair >> _QUERY_SHIFT, (pair >> _KEY_SHIFT) & _BLOCK_MASK, pair & (FIRST | LAST | INTERIOR)


def blocks_of(length: int, block: int) -> int:
    """Returns how many blocks hold `length` tokens."""
    return -(-length // block)


_EXPECTED_KEYS = 4096  # that the queries of a block see in rows of packed documents


def expected_pairs(blocks_q: int, blocks_kv: int, block_kv: int, causal: bool) -> float:
    """Estimates how many pairs a row visits, where a compiler wants to know it before there is a batch.

    Those below the diagonal, at most what queries see in packed documents.
    """
    seen = blocks_kv / 2 if causal else float(blocks_kv)
    return blocks_q * min(seen, 1 + _EXPECTED_KEYS / block_kv)


def plan_row(
    segments: Segments, *, causal: bool, block_q: int, block_kv: int
) -> tuple[Int32[Array, "pairs"], Int32[Array, "pairs"], Int32[Array, ""]]:
    """Returns `by_query`, `by_key` and `count` of one row (arrays (t,), (s,)). Raises ValueError beyond 8192 blocks."""
    # Every pair of blocks is judged by the bounds of its ids and positions: no token is compared with another.
    queries = _bounds(segments.q_ids, segments.q_pos, block_q)
    keys = _bounds(segments.kv_ids, segments.kv_pos, block_kv)
    n_q, n_k = queries.low_id.shape[0], keys.low_id.shape[0]
    if max(n_q, n_k) > MAX_BLOCKS:
        raise ValueError(f"{n_q} x {n_k} blocks of {block_q} x {block_kv}: at most {MAX_BLOCKS} fit a packed pair")
    visible, interior = _visible(queries, keys, causal)
    by_query = _list_pairs(visible, interior, transpose=False)
    by_key = _list_pairs(visible.T, interior.T, transpose=True)
    return by_query, by_key, visible.sum(dtype=jnp.int32)


class _Bounds(NamedTuple):
    """Holds per block the least and the greatest (id, position) of its tokens, and whether it has padding."""

    low_id: Array
    low_pos: Array
    high_id: Array
    high_pos: Array
    max_pos: Array
    min_pos: Array
    padded: Array


def _bounds(ids: Array, positions: Array, block: int) -> _Bounds:
    """Returns the bounds of a row's blocks; padding counts for none of them."""
    missing = -ids.shape[0] % block
    ids = jnp.pad(ids, (0, missing)).reshape(-1, block)
    positions = jnp.pad(positions, (0, missing)).reshape(-1, block)
    real = ids > 0
    # The first token is the least position within the least id, the last one the greatest within the greatest.
    low_id = jnp.where(real, ids, _LATE).min(1)
    high_id = ids.max(1)
    low_pos = jnp.where(ids == low_id[:, None], positions, _LATE).min(1)
    high_pos = jnp.where(real & (ids == high_id[:, None]), positions, -1).max(1)
    return _Bounds(
        low_id,
        low_pos,
        high_id,
        high_pos,
        max_pos=jnp.where(real, positions, -1).max(1),
        min_pos=jnp.where(real, positions, _LATE).min(1),
        padded=~real.all(1),
    )


def _visible(q: _Bounds, k: _Bounds, causal: bool) -> tuple[Bool[Array, "n_q n_k"], Bool[Array, "n_q n_k"]]:
    """Returns pairs whose ids overlap and, if causal, whose earliest key is not too late; and the interior ones."""
    q = _Bounds(*(field[:, None] for field in q))
    k = _Bounds(*(field[None, :] for field in k))
    # Exact while ids ascend along a row, in any order of blocks; else a pair too many may be visited, never too few.
    visible = (q.low_id <= k.high_id) & (k.low_id <= q.high_id) & (q.high_id > 0) & (k.high_id > 0)
    # Interior: one id on both sides and no padding, so that the mask can be skipped.
    interior = (q.low_id == q.high_id) & (k.low_id == k.high_id) & (q.low_id == k.low_id) & ~q.padded & ~k.padded
    if causal:
        visible &= (k.low_id < q.high_id) | ((k.low_id == q.high_id) & (k.low_pos <= q.high_pos))
        interior &= k.max_pos <= q.min_pos
    return visible, visible & interior


def _list_pairs(visible: Array, interior: Array, *, transpose: bool) -> Int32[Array, "pairs"]:
    """Lists visible pairs, row by row, packed; then one pair, FIRST and LAST, for each row that sees nothing."""
    n_rows = visible.shape[0]
    rows, columns = jnp.nonzero(visible, size=visible.size, fill_value=0)
    # One longer than the rows, so that it ends in `n_rows`, which stands for nothing.
    (unseen,) = jnp.nonzero(~visible.any(1), size=n_rows + 1, fill_value=n_rows)
    # Static shapes: the list is as long as there are pairs of blocks, `count` says how many are real.
    place = jnp.arange(visible.size)
    count = visible.sum()
    tail = unseen[jnp.clip(place - count, 0, n_rows)]
    rows = jnp.where(place < count, rows, tail).astype(jnp.int32)
    columns = columns.astype(jnp.int32)
    # A row's first and last pair tell a kernel when to clear its sums and when to write them.
    first = (place == 0) | (rows != jnp.roll(rows, 1))
    last = (place == visible.size - 1) | (rows != jnp.roll(rows, -1))
    interior = (place < count) & interior[rows, columns]
    flags = jnp.where(rows < n_rows, first * FIRST + last * LAST + interior * INTERIOR, 0).astype(jnp.int32)
    rows = jnp.minimum(rows, n_rows - 1)
    query, key = (columns, rows) if transpose else (rows, columns)
    return query << _QUERY_SHIFT | key << _KEY_SHIFT | flags
