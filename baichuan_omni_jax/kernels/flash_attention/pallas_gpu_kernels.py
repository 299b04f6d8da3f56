"""Attention's Triton kernels: one program computes one tile of one head of one row, from the tiles it visits.

A plan's block is cut into tiles that fit a multiprocessor. A program walks the pairs of its own block twice: first the
interior ones without masks, then the others, whose tiles are masked, and skipped where nothing in them is visible.
Scores are in base 2: exp2 is what the hardware has.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from baichuan_omni_jax.kernels.flash_attention.plan import blocks_of

# The log-sum-exp of a query that sees nothing; finite, so that sums of it stay numbers.
MASKED = -1e30
_LOG2_E = math.log2(math.e)


class Side(NamedTuple):
    """Describes the queries' or the keys' part of a row: `length` tokens in blocks of the plan, these in tiles."""

    length: int
    block: int
    tile: int

    @property
    def blocks(self) -> int:
        return blocks_of(self.length, self.block)

    @property
    def tiles_a_block(self) -> int:
        return blocks_of(self.block, self.tile)

    @property
    def tiles(self) -> int:
        return self.blocks * self.tiles_a_block

    def tokens(self, tile) -> tuple:
        """Returns the first token of a tile and which of its places hold a token of its block (None: all)."""
        inside = lax.rem(tile, self.tiles_a_block) * self.tile
        start = lax.div(tile, self.tiles_a_block) * self.block + inside
        # Where everything divides, no place needs a mask: loads are then whole and coalesced.
        if self.length % self.block == 0 and self.block % self.tile == 0:
            return start, None
        place = jnp.arange(self.tile)
        return start, (inside + place < self.block) & (start + place < self.length)


class Shape(NamedTuple):
    """Holds what a kernel is compiled for. `group` query heads share a key head."""

    query: Side
    key: Side
    group: int
    head_dim: int
    causal: bool
    scale: float

    @property
    def width(self) -> int:
        """Returns the head dim as Triton computes it: a power of two."""
        return pl.next_power_of_2(self.head_dim)


class Tokens(NamedTuple):
    """Holds one side's ids and positions (tiles, tile) and bounds (tiles, 4): arrays, or references in a kernel.

    Bounds: lowest id, that id's first position, highest id, that id's last position; of tokens that are no padding.
    """

    ids: Any
    positions: Any
    bounds: Any


def forward_kernel(q_ref, k_ref, v_ref, q_tokens, kv_tokens, start_ref, others_ref, out_ref, lse_ref, *, shape: Shape):
    """Computes one tile of queries of one head: softmax with a running maximum and sum."""
    tile = _query_tile(shape)
    rows, real = shape.query.tokens(tile)
    q = _load(q_ref.at[pl.ds(rows, shape.query.tile)], real, shape)
    seen = _Visible(q_tokens, kv_tokens, tile, shape)

    def attend(j, masked, state):
        top, total, acc = state
        keys, key_real = shape.key.tokens(j)
        k = _load(k_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
        v = _load(v_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
        # -inf and not MASKED: a masked score's weight must be 0 even where nothing else was seen yet.
        scores = _dot(q, k, ((1,), (1,))) * (shape.scale * _LOG2_E)
        if masked:
            scores = jnp.where(seen.mask(j), scores, -jnp.inf)
        # The running softmax: what was summed shrinks to the new maximum, then this tile is added.
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        acc = acc * shrink[:, None] + _dot(weights.astype(v.dtype), v, ((1,), (0,)))
        return new_top, total * shrink + weights.sum(1), acc

    size = shape.query.tile
    empty = (
        jnp.full(size, MASKED, jnp.float32),
        jnp.zeros(size, jnp.float32),
        jnp.zeros((size, shape.width), jnp.float32),
    )
    top, total, acc = _walk(attend, seen, start_ref, others_ref, tile, shape.query, shape.key, empty)
    # The log-sum-exp leaves base 2 here: other back ends and callers read it in base e.
    safe = jnp.where(total > 0, total, 1.0)
    _store(out_ref.at[pl.ds(rows, size)], acc / safe[:, None], real, shape)
    lse = jnp.where(total > 0, top / _LOG2_E + jnp.log(safe), MASKED)
    plgpu.store(lse_ref.at[pl.ds(rows, size)], lse, mask=real)


def dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    q_tokens,
    kv_tokens,
    start_ref,
    others_ref,
    dq_ref,
    *,
    shape: Shape,
):
    """Computes one tile of one head's query gradient."""
    tile = _query_tile(shape)
    rows, real = shape.query.tokens(tile)
    size = shape.query.tile
    q = _load(q_ref.at[pl.ds(rows, size)], real, shape)
    d_out = _load(d_out_ref.at[pl.ds(rows, size)], real, shape)
    lse = _load_vector(lse_ref.at[pl.ds(rows, size)], real)[:, None] * _LOG2_E
    delta = _load_vector(delta_ref.at[pl.ds(rows, size)], real)[:, None]
    seen = _Visible(q_tokens, kv_tokens, tile, shape)

    def attend(j, masked, d_q):
        keys, key_real = shape.key.tokens(j)
        k = _load(k_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
        v = _load(v_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
        # The weights again from the log-sum-exp, then the softmax's gradient: p * (dp - delta).
        weights = jnp.exp2(_dot(q, k, ((1,), (1,))) * (shape.scale * _LOG2_E) - lse)
        if masked:
            weights = jnp.where(seen.mask(j), weights, 0.0)
        d_scores = weights * (_dot(d_out, v, ((1,), (1,))) - delta)
        return d_q + _dot(d_scores.astype(k.dtype), k, ((1,), (0,)))

    zero = jnp.zeros((size, shape.width))
    d_q = _walk(attend, seen, start_ref, others_ref, tile, shape.query, shape.key, zero)
    _store(dq_ref.at[pl.ds(rows, size)], d_q * shape.scale, real, shape)


def dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    q_tokens,
    kv_tokens,
    start_ref,
    others_ref,
    dk_ref,
    dv_ref,
    *,
    shape: Shape,
):
    """Computes one tile of a key head's gradients, summed over its query heads. Scores are (keys, queries)."""
    tile = pl.program_id(0)
    keys, key_real = shape.key.tokens(tile)
    k = _load(k_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
    v = _load(v_ref.at[pl.ds(keys, shape.key.tile)], key_real, shape)
    seen = _Visible(kv_tokens, q_tokens, tile, shape, by_key=True)

    def attend(step, masked, state):
        d_k, d_v = state
        # Every tile of queries is visited once for each query head that shares this key head.
        i, head = lax.div(step, shape.group), lax.rem(step, shape.group)
        rows, real = shape.query.tokens(i)
        size = shape.query.tile
        q = _load(q_ref.at[pl.ds(rows, size), head], real, shape)
        d_out = _load(d_out_ref.at[pl.ds(rows, size), head], real, shape)
        lse = _load_vector(lse_ref.at[head, pl.ds(rows, size)], real)[None, :] * _LOG2_E
        delta = _load_vector(delta_ref.at[head, pl.ds(rows, size)], real)[None, :]
        # As in dq with rows and columns exchanged, so that sums over queries are products, not transposes.
        weights = jnp.exp2(_dot(k, q, ((1,), (1,))) * (shape.scale * _LOG2_E) - lse)
        if masked:
            weights = jnp.where(seen.mask(i), weights, 0.0)
        d_v += _dot(weights.astype(d_out.dtype), d_out, ((1,), (0,)))
        d_scores = weights * (_dot(v, d_out, ((1,), (1,))) - delta)
        return d_k + _dot(d_scores.astype(q.dtype), q, ((1,), (0,))), d_v

    zero = jnp.zeros((shape.key.tile, shape.width))
    d_k, d_v = _walk(
        attend, seen, start_ref, others_ref, tile, shape.key, shape.query, (zero, zero), repeats=shape.group
    )
    _store(dk_ref.at[pl.ds(keys, shape.key.tile)], d_k * shape.scale, key_real, shape)
    _store(dv_ref.at[pl.ds(keys, shape.key.tile)], d_v, key_real, shape)


class _Visible:
    """Tells what a program's own tile (axis 0 of the scores) sees of another (axis 1); `by_key`: it has keys."""

    def __init__(self, own: Tokens, others: Tokens, tile, shape: Shape, *, by_key: bool = False):
        self.others, self.causal, self.by_key = others, shape.causal, by_key
        self.ids, self.positions = own.ids[tile][:, None], own.positions[tile][:, None]
        self.bounds = [own.bounds[tile, i] for i in range(4)]

    def mask(self, other):
        ids, positions = self.others.ids[other][None, :], self.others.positions[other][None, :]
        mask = (self.ids == ids) & (self.ids > 0)
        if not self.causal:
            return mask
        earlier = self.positions <= positions if self.by_key else positions <= self.positions
        return mask & earlier

    def any(self, other):
        """Returns whether the tiles' bounds allow a visible pair: ids overlap, the earliest key is not too late."""
        # As `plan.py` judges blocks, for tiles: one comparison of bounds in place of a tile of scores.
        bounds = [self.others.bounds[other, i] for i in range(4)]
        query, key = (bounds, self.bounds) if self.by_key else (self.bounds, bounds)
        q_low, _, q_high, q_last = query
        k_low, k_first, k_high, _ = key
        visible = (q_low <= k_high) & (k_low <= q_high)
        if self.causal:
            visible &= (k_low < q_high) | (k_first <= q_last)
        return visible


def _walk(attend, seen: _Visible, start_ref, others_ref, tile, own: Side, others: Side, state, *, repeats: int = 1):
    """Returns `state` after `attend(place, masked, state)` for all tiles of the other side that this block visits.

    With `repeats` each tile is visited that many times: place = tile * repeats + which.
    """
    # Interior pairs first, without masks, then the masked ones: two tight loops, and no branch in the first.
    block = lax.div(tile, own.tiles_a_block)
    steps = others.tiles_a_block * repeats
    # Tiles as large as the plan's blocks are as fine as the plan: nothing is left to skip.
    may_skip = own.tiles_a_block > 1 or others.tiles_a_block > 1
    for masked in (False, True):
        first, last = start_ref[2 * block + masked], start_ref[2 * block + masked + 1]

        def visit(step, carry, masked=masked):
            other, state = carry
            # Asked for one step ahead, so that the tile's address is there when its turn comes.
            following = others_ref[lax.div(step + 1, steps)]
            place = other * steps + lax.rem(step, steps)
            step_on = partial(attend, place, masked)
            if not (masked and may_skip):
                return following, step_on(state)
            return following, lax.cond(seen.any(lax.div(place, repeats)), step_on, lambda state: state, state)

        _, state = lax.fori_loop(first * steps, last * steps, visit, (others_ref[first], state))
    return state


def _query_tile(shape: Shape):
    """Returns this program's tile, late queries first: in a long document they have the most to do."""
    return shape.query.tiles - 1 - pl.program_id(0)


def _dot(a, b, contracting):
    """Multiplies with fp32 sums; fp32 factors are multiplied as such (no TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _mask(real, shape: Shape):
    """Returns which places of a tile (tile, width) exist in memory; None: all."""
    columns = None if shape.width == shape.head_dim else (jnp.arange(shape.width) < shape.head_dim)[None, :]
    if real is None:
        return columns
    return real[:, None] if columns is None else real[:, None] & columns


def _load(ref, real, shape: Shape):
    mask = _mask(real, shape)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def _load_vector(ref, real):
    return plgpu.load(ref, mask=real, other=None if real is None else 0.0)


def _store(ref, value, real, shape: Shape):
    plgpu.store(ref, value.astype(ref.dtype), mask=_mask(real, shape))
