"""Blockwise attention in plain JAX: visits the plan's pairs only, forward and backward, on any platform.

One row at a time. Forward: for each query block, the key blocks of its pairs, with a running maximum and sum (fp32).
Backward: for each key block, the query blocks of its pairs; dk and dv stay local, dq is accumulated in place.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan, Segments, blocks_of, named, unpack

_MASKED = -1e30

Index = int | Array
_Pairs = tuple[Array, Array, Array]
_Saved = tuple[Array, Array, Array, Segments, _Pairs, Array, Array]


class _Static(NamedTuple):
    """Holds what a program is compiled for."""

    causal: bool
    scale: float
    block_q: int
    block_kv: int


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    segments: Segments,
    plan: BlockPlan,
    scale: float,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Computes attention and its log-sum-exp (fp32; -1e30 where nothing is seen). `plan` is one shard's, (b, 1, N)."""
    # Row by row: rows have different numbers of pairs, and one row's blocks are large enough for all cores.
    static = _Static(plan.causal, scale, plan.block_q, plan.block_kv)
    pairs = (plan.by_query[:, 0], plan.by_key[:, 0], plan.count[:, 0])
    return lax.map(lambda row: _attend_row(static, *row), (q, k, v, segments, pairs))


def unsupported(q: Array, k: Array, plan: BlockPlan) -> str | None:
    """Returns None: it runs everywhere."""
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_row(static: _Static, q: Array, k: Array, v: Array, segments: Segments, pairs: _Pairs):
    return _forward(static, q, k, v, segments, pairs)[0]


def _forward(
    static: _Static, q: Array, k: Array, v: Array, segments: Segments, pairs: _Pairs
) -> tuple[tuple[Array, Array], _Saved]:
    t, n, h = q.shape
    heads = k.shape[1]
    """Softmax with a running maximum and sum over the key blocks of each query block."""
    blocks = _Blocks(static, q, k, v, segments)
    by_query, _, count = pairs
    query_block, key_block, _ = unpack(by_query)
    start = _starts(query_block, count, blocks.n_q)

    def attend_block(i: Index) -> tuple[Array, Array]:
        # One pair: rescale what was summed to the new maximum, add this block's part.
        def visit(place, carry):
            top, total, acc = carry
            j = key_block[place]
            scores, mask = blocks.scores(i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum(
                "kgts,skh->kgth", weights.astype(v.dtype), blocks.v(j), preferred_element_type=jnp.float32
            )
            return new_top, total * shrink + weights.sum(-1), acc

        shape = (heads, n // heads, static.block_q)
        empty = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, h)))
        top, total, acc = lax.fori_loop(start[i], start[i + 1], visit, empty)
        # A query without a visible key divides by 1: zero, and the least log-sum-exp.
        safe = jnp.where(total > 0, total, 1.0)
        return acc / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), _MASKED)

    out, lse = lax.map(attend_block, jnp.arange(blocks.n_q))
    out = out.transpose(0, 3, 1, 2, 4).reshape(-1, n, h)[:t].astype(q.dtype)
    out, lse = named(out, lse.transpose(0, 3, 1, 2).reshape(-1, n)[:t])
    return (out, lse), (q, k, v, segments, pairs, out, lse)


def _backward(static: _Static, saved: _Saved, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    """Gradients by key block; weights are computed again from the log-sum-exp."""
    q, k, v, segments, pairs, out, lse = saved
    d_out, d_lse = cotangents
    blocks = _Blocks(static, q, k, v, segments)
    # d(score) = p * (d_out . v - delta), where the log-sum-exp's own cotangent enters as +p * d_lse.
    delta = jnp.einsum("tnh,tnh->tn", out, d_out, preferred_element_type=jnp.float32) - d_lse
    d_out, lse, delta = (blocks.pad_queries(x) for x in (d_out, lse, delta))
    _, by_key, count = pairs
    query_block, key_block, _ = unpack(by_key)
    start = _starts(key_block, count, blocks.n_k)

    # Key block by key block: dk and dv are complete when its queries are through; dq collects in place, in fp32.
    def visit_key_block(d_q, j):
        def visit(place, carry):
            d_q, d_k, d_v = carry
            i = query_block[place]
            scores, mask = blocks.scores(i, j)
            grad = blocks.query_block(d_out, i)
            weights = jnp.where(mask, jnp.exp(scores - blocks.query_block(lse, i)[..., None]), 0.0)
            d_v += jnp.einsum("kgts,kgth->skh", weights.astype(v.dtype), grad, preferred_element_type=jnp.float32)
            d_weights = jnp.einsum("kgth,skh->kgts", grad, blocks.v(j), preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - blocks.query_block(delta, i)[..., None]) * static.scale
            # Products take the inputs' dtype; sums stay in fp32.
            d_scores = d_scores.astype(q.dtype)
            d_k += jnp.einsum("kgts,kgth->skh", d_scores, blocks.q(i), preferred_element_type=jnp.float32)
            step = jnp.einsum("kgts,skh->kgth", d_scores, blocks.k(j), preferred_element_type=jnp.float32)
            old = lax.dynamic_index_in_dim(d_q, i, keepdims=False)
            return lax.dynamic_update_index_in_dim(d_q, old + step, i, 0), d_k, d_v

        zero = jnp.zeros((static.block_kv, *k.shape[1:]), jnp.float32)
        d_q, d_k, d_v = lax.fori_loop(start[j], start[j + 1], visit, (d_q, zero, zero))
        return d_q, (d_k, d_v)

    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    d_q = jnp.zeros((blocks.n_q, heads, group, static.block_q, q.shape[2]), jnp.float32)
    d_q, (d_k, d_v) = lax.scan(visit_key_block, d_q, jnp.arange(blocks.n_k))
    d_q = d_q.transpose(0, 3, 1, 2, 4).reshape(-1, *q.shape[1:])[: q.shape[0]].astype(q.dtype)
    d_k = d_k.reshape(-1, *k.shape[1:])[: k.shape[0]].astype(k.dtype)
    d_v = d_v.reshape(-1, *v.shape[1:])[: v.shape[0]].astype(v.dtype)
    return d_q, d_k, d_v, None, None


_attend_row.defvjp(_forward, _backward)


class _Blocks:
    """Cuts one row's arrays in blocks: queries (heads, group, block_q, ...), keys and values (block_kv, heads, h)."""

    def __init__(self, static: _Static, q: Array, k: Array, v: Array, segments: Segments):
        self.static = static
        self.n_q = blocks_of(q.shape[0], static.block_q)
        self.n_k = blocks_of(k.shape[0], static.block_kv)
        self.heads = k.shape[1]
        self._q = self.pad_queries(q)
        self._k, self._v = self._pad_keys(k), self._pad_keys(v)
        self._q_ids, self._q_pos = self.pad_queries(segments.q_ids), self.pad_queries(segments.q_pos)
        self._kv_ids, self._kv_pos = self._pad_keys(segments.kv_ids), self._pad_keys(segments.kv_pos)

    def pad_queries(self, x: Array) -> Array:
        """Cuts (t, ...) into (blocks, block_q, ...); a heads axis is split and goes first: (blocks, k, g, block_q)."""
        x = _cut(x, self.n_q, self.static.block_q)
        if x.ndim == 2:
            return x
        x = x.reshape(*x.shape[:2], self.heads, -1, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def _pad_keys(self, x: Array) -> Array:
        return _cut(x, self.n_k, self.static.block_kv)

    def query_block(self, x: Array, i: Index) -> Array:
        return lax.dynamic_index_in_dim(x, i, keepdims=False)

    def q(self, i: Index) -> Array:
        return self.query_block(self._q, i)

    def k(self, j: Index) -> Array:
        return lax.dynamic_index_in_dim(self._k, j, keepdims=False)

    def v(self, j: Index) -> Array:
        return lax.dynamic_index_in_dim(self._v, j, keepdims=False)

    def scores(self, i: Index, j: Index) -> tuple[Array, Array]:
        """Returns scaled scores (k, g, block_q, block_kv) fp32, masked, and the mask (block_q, block_kv)."""
        # The scale comes after the product, in fp32, and the mask last.
        scores = jnp.einsum("kgth,skh->kgts", self.q(i), self.k(j), preferred_element_type=jnp.float32)
        q_ids, kv_ids = self._q_ids[i][:, None], self._kv_ids[j][None, :]
        mask = (q_ids == kv_ids) & (q_ids > 0)
        if self.static.causal:
            mask &= self._kv_pos[j][None, :] <= self._q_pos[i][:, None]
        return jnp.where(mask, scores * self.static.scale, _MASKED), mask


def _cut(x: Array, blocks: int, block: int) -> Array:
    """Pads the first dim to whole blocks and cuts it."""
    pad = [(0, blocks * block - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(blocks, block, *x.shape[1:])


def _starts(row: Array, count: Array, rows: int) -> Array:
    """Returns where the pairs of each row begin in a list ordered by row: (rows + 1,)."""
    row = jnp.where(jnp.arange(row.shape[0]) < count, row, rows)
    return jnp.searchsorted(row, jnp.arange(rows + 1)).astype(jnp.int32)
