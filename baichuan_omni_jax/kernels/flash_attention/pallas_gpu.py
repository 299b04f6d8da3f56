"""Attention on NVIDIA GPUs: Triton kernels, through Pallas, that visit the plan's pairs only.

No library's kernel does this: cuDNN's packed layout and Tokamax's key ranges know segments that lie in one piece and
in order, in half precision; here blocks may be permuted (context parallelism) and fp32 is computed as such.
The kernels are in `pallas_gpu_kernels.py`; here are their tiles, their launches and the gradient that joins them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from baichuan_omni_jax.kernels.flash_attention.pallas_gpu_kernels import (
    Shape,
    Side,
    Tokens,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
)
from baichuan_omni_jax.kernels.flash_attention.plan import INTERIOR, BlockPlan, Segments, expected_pairs, named, unpack

_MAX_HEAD_DIM = 128  # beyond it a tile's fp32 sums do not fit the registers
_BLOCK_BITS = 13  # as in a packed pair of the plan
_LATE = jnp.iinfo(jnp.int32).max


class _Tiles(NamedTuple):
    """Holds tokens a tile of queries and of keys, warps a program, and how many tiles ahead are fetched."""

    query: int
    key: int
    warps: int
    stages: int


# For Hopper, with 228 KiB of shared memory and 64 K registers a multiprocessor: one program fills it. 8 warps are two
# warpgroups, each with 64 rows of the own tile, whose fp32 sums take 64 registers a thread, 128 for dk and dv. The
# visited tile is the largest whose scores fit beside them: compiled for sm_90 by Triton 3.9 at head dim 128, no loop
# spills a register (with 64 queries in dkv, both do).
_HALF = {"forward": _Tiles(128, 128, 8, 2), "dq": _Tiles(128, 64, 8, 2), "dkv": _Tiles(32, 128, 8, 3)}
# fp32 is multiplied without tensor cores (they would round to TF32), from registers: small tiles.
_SINGLE = {"forward": _Tiles(32, 64, 8, 1), "dq": _Tiles(32, 16, 8, 1), "dkv": _Tiles(32, 16, 8, 1)}


_Kind = Literal["query", "key", "statistic"]
_Pairs = tuple[Array, Array, Array]


class _Static(NamedTuple):
    """Holds what a program is compiled for."""

    causal: bool
    scale: float
    block_q: int
    block_kv: int
    interpret: bool


def unsupported(q: Array, k: Array, plan: BlockPlan) -> str | None:
    """Returns why these kernels cannot compute it: a head dim beyond 128 or another dtype than bf16, fp16 and fp32."""
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"head dim {q.shape[3]} is more than {_MAX_HEAD_DIM}, whose sums fill a multiprocessor's registers"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{q.dtype} is not bfloat16, float16 or float32"
    return None


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    segments: Segments,
    plan: BlockPlan,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Computes attention and its log-sum-exp (fp32; -1e30 where nothing is seen). `plan` is one shard's, (b, 1, N).

    `interpret` runs the kernels in plain JAX, on any platform: for tests.
    """
    static = _Static(plan.causal, scale, plan.block_q, plan.block_kv, interpret)
    return _attend(static, q, k, v, segments, (plan.by_query[:, 0], plan.by_key[:, 0], plan.count[:, 0]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, segments: Segments, pairs: _Pairs):
    return _forward(static, q, k, v, segments, pairs)[0]


def _forward(
    static: _Static, q: Array, k: Array, v: Array, segments: Segments, pairs: _Pairs
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    by_query, _, count = pairs
    arrays: list[tuple[_Kind, Array]] = [("query", q), ("key", k), ("key", v)]
    outputs: list[tuple[_Kind, DTypeLike]] = [("query", q.dtype), ("statistic", jnp.float32)]
    out, lse = named(*_launch(forward_kernel, "forward", static, arrays, outputs, segments, by_query, count))
    return (out, lse.transpose(0, 2, 1)), (q, k, v, segments, pairs, out, lse)


def _backward(static: _Static, saved: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, segments, (by_query, by_key, count), out, lse = saved
    d_out, d_lse = cotangents
    # d(score) = p * (d_out . v - delta), where the log-sum-exp's own cotangent enters as +p * d_lse.
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32) - d_lse.transpose(0, 2, 1)
    arrays: list[tuple[_Kind, Array]] = [("query", q), ("key", k), ("key", v)]
    arrays += [("query", d_out), ("statistic", lse), ("statistic", delta)]
    (d_q,) = _launch(dq_kernel, "dq", static, arrays, [("query", q.dtype)], segments, by_query, count)
    outputs: list[tuple[_Kind, DTypeLike]] = [("key", k.dtype), ("key", v.dtype)]
    d_k, d_v = _launch(dkv_kernel, "dkv", static, arrays, outputs, segments, by_key, count)
    return d_q, d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _launch(
    kernel: Callable[..., None],
    name: Literal["forward", "dq", "dkv"],
    static: _Static,
    arrays: Sequence[tuple[_Kind, Array]],
    outputs: Sequence[tuple[_Kind, DTypeLike]],
    segments: Segments,
    pairs: Array,
    count: Array,
) -> Sequence[Array]:
    """Runs a kernel over its tiles, heads and rows.

    Args:
        kernel: of `pallas_gpu_kernels`.
        name: which tiles it takes; `dkv` goes by keys, the others by queries.
        static: what all launches share.
        arrays: inputs, with what each of them is.
        outputs: what each result is, and its dtype.
        segments: which tokens see each other.
        pairs: the plan's pairs (b, N) in the order that the kernel walks them.
        count: how many of them are real (b,).
    """
    # Tiles by kernel and precision; a plan's block is cut in whole tiles where it can be.
    q, k = arrays[0][1], arrays[1][1]
    by_key = name == "dkv"
    tiles = (_SINGLE if q.dtype == jnp.float32 else _HALF)[name]
    shape = Shape(
        query=_side(q.shape[1], static.block_q, tiles.query),
        key=_side(k.shape[1], static.block_kv, tiles.key),
        group=q.shape[2] // k.shape[2],
        head_dim=q.shape[3],
        causal=static.causal,
        scale=static.scale,
    )
    whole = all(side.block % side.tile == 0 for side in (shape.query, shape.key))
    # Bounds by tile let a masked tile in which nothing is visible be skipped.
    tokens = (
        _tokens(segments.q_ids, segments.q_pos, shape.query),
        _tokens(segments.kv_ids, segments.kv_pos, shape.key),
    )
    visits = _visits(pairs, count, (shape.key if by_key else shape.query).blocks, by_key=by_key, interior=whole)
    # A program sees its row and head of each array, and of the token tables its whole row.
    specs = _specs(shape, by_key)
    whole_row = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i, head, row: (row, *[0] * (x.ndim - 1)))  # noqa: E731
    whole_rows = jax.tree.map(whole_row, (*tokens, *visits))
    shapes = {"query": q.shape, "key": k.shape, "statistic": (q.shape[0], q.shape[2], q.shape[1])}
    return pl.pallas_call(
        partial(kernel, shape=shape),
        grid=(shape.key.tiles, k.shape[2], q.shape[0]) if by_key else (shape.query.tiles, q.shape[2], q.shape[0]),
        in_specs=[*(specs[kind] for kind, _ in arrays), *whole_rows],
        out_specs=[specs[kind] for kind, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=_cost(static, name, shape, q, k, outputs),
        interpret=static.interpret,
        name=f"flash_attention_{name}",
    )(*(x for _, x in arrays), *tokens, *visits)


_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products of a pair and head


def _cost(
    static: _Static, name: str, shape: Shape, q: Array, k: Array, outputs: Sequence[tuple[_Kind, DTypeLike]]
) -> pl.CostEstimate:
    """Estimates FLOPs, exponentials and bytes, which XLA's scheduler would take for none."""
    rows, heads = q.shape[0], q.shape[2]
    pairs = rows * heads * expected_pairs(shape.query.blocks, shape.key.blocks, static.block_kv, static.causal)
    scores = pairs * static.block_q * static.block_kv
    # A tile's own side is read once, the other side with every pair; results are written once.
    by_pair = 2 * static.block_kv * q.shape[3] * q.dtype.itemsize
    written = sum((q if kind != "key" else k).size * jnp.dtype(dtype).itemsize for kind, dtype in outputs)
    return pl.CostEstimate(
        flops=int(2 * _PRODUCTS[name] * scores * q.shape[3]),
        transcendentals=int(scores),
        bytes_accessed=int(pairs * by_pair + q.size * q.dtype.itemsize + written),
    )


def _side(length: int, block: int, tile: int) -> Side:
    """Returns tiles no larger than the plan's blocks, but never less than the 16 rows of a tensor core product."""
    return Side(length, block, max(16, min(tile, pl.next_power_of_2(block))))


def _specs(shape: Shape, by_key: bool) -> dict[str, pl.BlockSpec]:
    """Returns what a program (tile, head, row) sees of each kind of array: its row and head, all tokens."""
    t, s, width, group = shape.query.length, shape.key.length, shape.width, shape.group
    at_head = lambda i, head, row: (row, 0, head, 0)  # noqa: E731
    if by_key:
        return {
            "query": pl.BlockSpec((None, t, group, width), at_head),
            "key": pl.BlockSpec((None, s, None, width), at_head),
            "statistic": pl.BlockSpec((None, group, t), lambda i, head, row: (row, head, 0)),
        }
    return {
        "query": pl.BlockSpec((None, t, None, width), at_head),
        "key": pl.BlockSpec((None, s, None, width), lambda i, head, row: (row, 0, lax.div(head, group), 0)),
        "statistic": pl.BlockSpec((None, None, t), lambda i, head, row: (row, head, 0)),
    }


def _tokens(ids: Array, positions: Array, side: Side) -> Tokens:
    """Returns ids, positions and bounds by tile; the places of a tile beyond its block hold padding."""
    ids, positions = _cut(ids, side), _cut(positions, side)
    # Padding has no part in the bounds: a tile of nothing else has none that overlap.
    low = jnp.where(ids > 0, ids, _LATE).min(2, keepdims=True)
    high = ids.max(2, keepdims=True)
    low_position = jnp.where(ids == low, positions, _LATE).min(2, keepdims=True)
    high_position = jnp.where(ids == high, positions, -1).max(2, keepdims=True)
    return Tokens(ids, positions, jnp.concatenate([low, low_position, high, high_position], 2))


def _cut(x: Array, side: Side) -> Array:
    """Cuts (b, length) into (b, tiles, tile): whole blocks first, then whole tiles of each."""
    x = jnp.pad(x, ((0, 0), (0, side.blocks * side.block - side.length))).reshape(-1, side.blocks, side.block)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, side.tiles_a_block * side.tile - side.block)))
    return x.reshape(-1, side.tiles, side.tile)


def _visits(pairs: Array, count: Array, blocks: int, *, by_key: bool, interior: bool) -> tuple[Array, Array]:
    """Lists which blocks each block visits, interior ones first: starts (b, 2 * blocks + 1) and the list (b, N + 1).

    Block i's interior pairs are others[start[2 i] : start[2 i + 1]], its masked ones follow up to start[2 i + 2].
    `interior`: False where a tile may reach beyond its block, so that every pair needs its mask.
    """
    # Sorted by (own block, masked, other block): each block's interior pairs, then its masked ones; unused pairs last.
    query, key, flags = unpack(pairs)
    own, other = (key, query) if by_key else (query, key)
    masked = jnp.int32(1) - ((flags & INTERIOR > 0) & interior)
    order = (2 * own + masked) << _BLOCK_BITS | other
    order = jnp.sort(jnp.where(jnp.arange(pairs.shape[1]) < count[:, None], order, _LATE), axis=1)
    bounds = jnp.arange(2 * blocks + 1, dtype=jnp.int32) << _BLOCK_BITS
    start = jax.vmap(lambda row: jnp.searchsorted(row, bounds))(order).astype(jnp.int32)
    others = jnp.where(order == _LATE, 0, order & (1 << _BLOCK_BITS) - 1)
    return start, jnp.pad(others, ((0, 0), (0, 1)))
