"""The TPU kernels: forward, dq, and dk with dv. One grid step handles one block pair for several heads.

Tokens lie on lanes and the head dim on sublanes, (heads, h, tokens), so that head dims of 64 and 80 fill whole tiles;
scores are (keys, queries), and a query's statistics are a row. Softmax runs in base 2 with the scale folded in.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from baichuan_omni_jax.kernels.flash_attention.plan import FIRST, INTERIOR, LAST, expected_pairs, unpack

Side = Literal["query", "key"]

UNSEEN = -1e30
# Below every score and above UNSEEN: a masked score's weight is 0 even where the maximum has seen nothing else.
_FLOOR = -1e29
# Scores are scaled by it once, and exp2 is what the hardware has.
_LOG2E = math.log2(math.e)


class Static(NamedTuple):
    """Holds what the kernels are built for: `kv_heads` key heads a grid step, each with its `group` of query heads."""

    causal: bool
    scale: float
    block_q: int
    block_kv: int
    kv_heads: int
    group: int
    vmem_bytes: int
    interpret: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


class Visits(NamedTuple):
    """Holds pairs in the order of their visit (b * N,), and per row how many are real and how many steps (b,).

    The steps after the real pairs only write the blocks that no pair visits.
    """

    pairs: Array
    real: Array
    steps: Array

    @classmethod
    def from_pairs(cls, pairs: Array, count: Array) -> "Visits":
        """Takes them from a plan's list (b, N) and count (b,)."""
        unvisited = (jnp.arange(pairs.shape[1]) >= count[:, None]) & (pairs & FIRST > 0)
        return cls(pairs.reshape(-1), count, count + unvisited.sum(1, dtype=jnp.int32))


def forward(static: Static, visits: Visits, q, k, v, q_tokens, kv_tokens) -> tuple[Array, Array]:
    """Computes output (b, groups, heads, h, t) in q's dtype and log-sum-exp (b, groups, heads, t) fp32.

    q (b, groups, heads, h, t); k, v (b, groups, kv_heads, h, s); tokens (b, 8, t): ids, positions, zeros.
    """
    row = (*q.shape[:3], q.shape[4])
    out, lse = _visit(
        _forward_kernel,
        static,
        visits,
        queries=(q, q_tokens),
        keys=(k, v, kv_tokens),
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(row, jnp.float32)],
        side="query",
        scratch=[
            pltpu.VMEM((static.heads, static.block_q), jnp.float32),
            pltpu.VMEM((static.heads, static.block_q), jnp.float32),
            pltpu.VMEM((static.heads, q.shape[3], static.block_q), jnp.float32),
        ],
        products=2,
    )
    return out, lse


def backward_dq(static: Static, visits: Visits, q, k, v, q_tokens, kv_tokens, d_out, lse, delta) -> Array:
    """Computes dq like q. `lse` is in base 2, `delta` = out . d_out less the lse's cotangent, (b, groups, heads, t)."""
    (d_q,) = _visit(
        _dq_kernel,
        static,
        visits,
        queries=(q, d_out, lse, delta, q_tokens),
        keys=(k, v, kv_tokens),
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        side="query",
        scratch=[pltpu.VMEM((static.heads, q.shape[3], static.block_q), jnp.float32)],
        products=3,
    )
    return d_q


def backward_dkv(
    static: Static, visits: Visits, q, k, v, q_tokens, kv_tokens, d_out, lse, delta
) -> tuple[Array, Array]:
    """Computes dk and dv like k, summed over each key head's group of query heads."""
    accumulator = pltpu.VMEM((static.kv_heads, k.shape[3], static.block_kv), jnp.float32)
    d_k, d_v = _visit(
        _dkv_kernel,
        static,
        visits,
        queries=(q, d_out, lse, delta, q_tokens),
        keys=(k, v, kv_tokens),
        out=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        side="key",
        scratch=[accumulator, accumulator],
        products=4,
    )
    return d_k, d_v


def _visit(
    kernel: Callable,
    static: Static,
    visits: Visits,
    *,
    queries: Sequence[Array],
    keys: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
    side: Side,
    scratch: Sequence[Any],
    products: int,
) -> tuple[Array, ...]:
    """Runs `kernel` over (rows, groups of heads, steps); arrays are blocked along their last axis, the tokens.

    Args:
        kernel: called with the pairs, the queries' blocks, the keys' blocks, the results' blocks, the scratch.
        static: sizes.
        visits: which pair of blocks each step sees.
        queries: arrays blocked by queries.
        keys: arrays blocked by keys.
        out: shapes of the results.
        side: whose blocks the results have; pairs are in the order of that side.
        scratch: what a core keeps between the steps of a block.
        products: matrix products of a pair and head, for the estimate of what the kernel costs.
    """
    rows, groups = queries[0].shape[:2]
    length = visits.pairs.shape[0] // rows

    # Which block of an array a grid step sees: read off the plan's pair, which scalar memory holds ahead of time.
    def spec(array: Any, side: Side) -> pl.BlockSpec:
        by_group = array.ndim > 3  # Else it is tokens, which all heads share.

        def index(row, group, step, pairs, count, steps):
            # Steps beyond a row's own stay on its last block, which is then neither fetched nor written again.
            pair = pairs[row * length + jnp.minimum(step, steps[row] - 1)]
            query, key, _ = unpack(pair)
            middle = (group, *[0] * (array.ndim - 3)) if by_group else (0,)
            return (row, *middle, query if side == "query" else key)

        inner = array.shape[2 if by_group else 1 : -1]
        block = static.block_q if side == "query" else static.block_kv
        return pl.BlockSpec((None, *([None] if by_group else []), *inner, block), index)

    run = pl.pallas_call(
        functools.partial(kernel, static=static, length=length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, groups, visits.steps.max()),
            in_specs=[*(spec(x, "query") for x in queries), *(spec(x, "key") for x in keys)],
            out_specs=[spec(x, side) for x in out],
            scratch_shapes=scratch,
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=static.vmem_bytes
        ),
        cost_estimate=_cost(static, products, queries, keys, out, length),
        interpret=static.interpret,
        name=kernel.__name__.strip("_"),
    )
    return tuple(run(*visits, *queries, *keys))


def _cost(
    static: Static, products: int, queries: Sequence[Array], keys: Sequence[Array], out: Sequence[Any], length: int
) -> pl.CostEstimate:
    """Estimates FLOPs, exponentials and bytes of a kernel, so that XLA's scheduler does not take it for free."""
    rows, groups, _, width, tokens = queries[0].shape
    blocks_q = -(-tokens // static.block_q)
    blocks_kv = length // blocks_q
    pairs = rows * groups * expected_pairs(blocks_q, blocks_kv, static.block_kv, static.causal)
    scores = pairs * static.heads * static.block_q * static.block_kv
    # Blocks of the keys' side come with every pair, those of the queries once a block (dk, dv: the other way round).
    size = lambda arrays: sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)  # noqa: E731
    by_pair = size(keys) * pairs / (rows * groups * blocks_kv)
    return pl.CostEstimate(
        flops=int(2 * products * scores * width),
        transcendentals=int(scores),
        bytes_accessed=int(by_pair + size(queries) + size(out)),
    )


class _Step:
    """Says what this grid step has to do."""

    def __init__(self, pairs, count, steps, length: int):
        # Rows have different numbers of pairs, the grid one number of steps: those past a row's own do nothing.
        row, step = pl.program_id(0), pl.program_id(2)
        flags = pairs[row * length + jnp.minimum(step, steps[row] - 1)]
        mine, real = step < steps[row], step < count[row]
        self.first = mine & (flags & FIRST > 0)
        self.last = mine & (flags & LAST > 0)
        self.interior = real & (flags & INTERIOR > 0)
        self.edge = real & (flags & INTERIOR == 0)

    def run(self, start: Callable, visit: Callable, finish: Callable) -> None:
        """Calls `start` at a block's first pair, `visit(masked)` at every real one, `finish` at its last."""
        pl.when(self.first)(start)
        pl.when(self.interior)(lambda: visit(False))
        pl.when(self.edge)(lambda: visit(True))
        pl.when(self.last)(finish)


def _forward_kernel(
    pairs, count, steps, q, q_tokens, k, v, kv_tokens, out, lse, top, total, acc, *, static: Static, length
):
    def start():
        top[...] = jnp.full_like(top, _FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(masked: bool):
        # One mask for all heads of the step; then head by head the running maximum, sum and weighted values.
        mask = _mask(static, q_tokens, kv_tokens) if masked else None
        for head in range(static.heads):
            row = slice(head, head + 1)
            scores = _scores(static, k[head // static.group], q[head], mask)
            new_top = jnp.maximum(top[row], scores.max(0, keepdims=True))
            weights = jnp.exp2(scores - new_top)
            shrink = jnp.exp2(top[row] - new_top)
            top[row] = new_top
            total[row] = total[row] * shrink + weights.sum(0, keepdims=True)
            value = v[head // static.group]
            acc[head] = acc[head] * shrink + _dot(value, weights.astype(value.dtype), 1, 0)

    # Written once a block of queries, when its last pair is through; unvisited blocks come here with sums of zero.
    def finish():
        seen = total[...] > 0
        safe = jnp.where(seen, total[...], 1.0)
        lse[...] = jnp.where(seen, top[...] / _LOG2E + jnp.log(safe), UNSEEN)
        for head in range(static.heads):
            out[head] = (acc[head] / safe[head : head + 1]).astype(out.dtype)

    _Step(pairs, count, steps, length).run(start, visit, finish)


def _dq_kernel(
    pairs, count, steps, q, d_out, lse, delta, q_tokens, k, v, kv_tokens, d_q, acc, *, static: Static, length
):
    def start():
        acc[...] = jnp.zeros_like(acc)

    def visit(masked: bool):
        mask = _mask(static, q_tokens, kv_tokens) if masked else None
        for head in range(static.heads):
            key, value = k[head // static.group], v[head // static.group]
            # The scale waits for the end: one multiplication a block instead of one a pair.
            _, d_scores = _gradients(static, head, q, key, value, d_out, lse, delta, mask)
            acc[head] += _dot(key, d_scores.astype(key.dtype), 1, 0)

    def finish():
        d_q[...] = (acc[...] * static.scale).astype(d_q.dtype)

    _Step(pairs, count, steps, length).run(start, visit, finish)


def _dkv_kernel(
    pairs,
    count,
    steps,
    q,
    d_out,
    lse,
    delta,
    q_tokens,
    k,
    v,
    kv_tokens,
    d_k,
    d_v,
    k_acc,
    v_acc,
    *,
    static: Static,
    length,
):
    def start():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def visit(masked: bool):
        mask = _mask(static, q_tokens, kv_tokens) if masked else None
        for head in range(static.heads):
            # Query heads of a group add to the same key head.
            kv_head = head // static.group
            weights, d_scores = _gradients(static, head, q, k[kv_head], v[kv_head], d_out, lse, delta, mask)
            v_acc[kv_head] += _dot(d_out[head], weights.astype(d_out.dtype), 1, 1)
            k_acc[kv_head] += _dot(q[head], d_scores.astype(q.dtype), 1, 1)

    def finish():
        d_k[...] = (k_acc[...] * static.scale).astype(d_k.dtype)
        d_v[...] = v_acc[...].astype(d_v.dtype)

    _Step(pairs, count, steps, length).run(start, visit, finish)


def _mask(static: Static, q_tokens, kv_tokens) -> Array:
    """Returns (block_kv, block_q): which keys (down) each query (across) sees. Padding queries have id -1."""
    # Keys lie on lanes as queries do; their small table is turned once a step, for scores of (keys, queries).
    columns = kv_tokens[...].T
    mask = columns[:, 0:1] == q_tokens[0:1]
    return mask & (columns[:, 1:2] <= q_tokens[1:2]) if static.causal else mask


def _scores(static: Static, key: Array, query: Array, mask: Array | None) -> Array:
    """Returns base-2 scores (block_kv, block_q) of one head, fp32; UNSEEN where the mask says so."""
    scores = _dot(key, query, 0, 0) * (static.scale * _LOG2E)
    return scores if mask is None else jnp.where(mask, scores, UNSEEN)


def _gradients(static: Static, head: int, q, key, value, d_out, lse, delta, mask) -> tuple[Array, Array]:
    """Returns softmax weights and the gradients of the scaled scores, (block_kv, block_q) fp32."""
    row = slice(head, head + 1)
    # The forward pass's weights again, from its log-sum-exp: nothing of size (queries, keys) was kept.
    weights = jnp.exp2(_scores(static, key, q[head], mask) - lse[row])
    return weights, weights * (_dot(value, d_out[head], 0, 0) - delta[row])


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiplies matrices over one axis of each, summed in fp32; fp32 inputs are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
