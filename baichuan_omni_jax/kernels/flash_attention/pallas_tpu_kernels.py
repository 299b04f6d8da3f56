"""The TPU kernels: forward, dq, and dk with dv. One grid step handles one block pair for several heads.

Tokens lie on lanes and the head dim on sublanes, (heads, h, tokens), so that head dims of 64 and 80 fill whole tiles;
scores are (keys, queries), and a query's statistics are a row. Softmax runs in base 2 with the scale folded in.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from baichuan_omni_jax.kernels.flash_attention.pallas_tpu_grid import Static, Step, Visits, visit_pairs

UNSEEN = -1e30
# Below every score and above UNSEEN: a masked score's weight is 0 even where the maximum has seen nothing else.
_FLOOR = -1e29
# Scores are scaled by it once, and exp2 is what the hardware has.
_LOG2E = math.log2(math.e)
_CHUNK = 128  # queries whose softmax is computed at once, one tile of lanes: their scores are 64 registers for 512 keys


def forward(static: Static, visits: Visits, q, k, v, q_tokens, kv_tokens) -> tuple[Array, Array]:
    """Computes output (b, groups, heads, h, t) in q's dtype and log-sum-exp (b, groups, heads, t) fp32.

    q (b, groups, heads, h, t); k, v (b, groups, kv_heads, h, s); tokens (b, 8, t): ids, positions, zeros.
    """
    row = (*q.shape[:3], q.shape[4])
    out, lse = visit_pairs(
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
    (d_q,) = visit_pairs(
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
    d_k, d_v = visit_pairs(
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


def _forward_kernel(
    pairs, count, bounds, q, q_tokens, k, v, kv_tokens, out, lse, top, total, acc, *, static: Static, length, cores
):
    def start():
        top[...] = jnp.full_like(top, _FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(masked: bool):
        # Keys are turned once for all heads and chunks: a product over their first axis turns them each time.
        keys = [k[head].T for head in range(static.kv_heads)]
        masks = {part.start: _mask(static, q_tokens, kv_tokens, part) if masked else None for part in _parts(static)}

        def scores_of(part: slice, head: int) -> Array:
            return _scores(static, keys[head // static.group], 1, q[head, :, part], masks[part.start])

        # Chunks of queries, whose scores take few registers, and the next chunk's scores before this one's softmax: the
        # matrix units have work meanwhile. Of each the running maximum, sum and weighted values.
        chunks = [(part, head) for part in _parts(static) for head in range(static.heads)]
        ahead = scores_of(*chunks[0])
        for place, (part, head) in enumerate(chunks):
            scores = ahead
            if place + 1 < len(chunks):
                ahead = scores_of(*chunks[place + 1])
            row = slice(head, head + 1)
            new_top = jnp.maximum(top[row, part], scores.max(0, keepdims=True))
            weights = jnp.exp2(scores - new_top)
            shrink = jnp.exp2(top[row, part] - new_top)
            top[row, part] = new_top
            total[row, part] = total[row, part] * shrink + weights.sum(0, keepdims=True)
            value = v[head // static.group]
            acc[head, :, part] = acc[head, :, part] * shrink + _dot(value, weights.astype(value.dtype), 1, 0)

    # Written once a block of queries, when its last pair is through; unvisited blocks come here with sums of zero.
    def finish():
        seen = total[...] > 0
        safe = jnp.where(seen, total[...], 1.0)
        lse[...] = jnp.where(seen, top[...] / _LOG2E + jnp.log(safe), UNSEEN)
        for head in range(static.heads):
            out[head] = (acc[head] / safe[head : head + 1]).astype(out.dtype)

    Step(pairs, count, bounds, length, cores).run(start, visit, finish)


def _dq_kernel(
    pairs, count, bounds, q, d_out, lse, delta, q_tokens, k, v, kv_tokens, d_q, acc, *, static: Static, length, cores
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

    Step(pairs, count, bounds, length, cores).run(start, visit, finish)


def _dkv_kernel(
    pairs,
    count,
    bounds,
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
    cores,
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

    Step(pairs, count, bounds, length, cores).run(start, visit, finish)


def _parts(static: Static) -> list[slice]:
    """Cuts a block's queries into chunks of one tile of lanes."""
    return [slice(begin, begin + _CHUNK) for begin in range(0, static.block_q, _CHUNK)]


def _mask(static: Static, q_tokens, kv_tokens, part: slice = slice(None)) -> Array:
    """Returns (block_kv, queries of `part`): which keys (down) each query (across) sees. Padding queries have id -1."""
    # Keys lie on lanes as queries do; their small table is turned once a step, for scores of (keys, queries).
    columns = kv_tokens[...].T
    mask = columns[:, 0:1] == q_tokens[0:1, part]
    return mask & (columns[:, 1:2] <= q_tokens[1:2, part]) if static.causal else mask


def _scores(static: Static, key: Array, key_axis: int, query: Array, mask: Array | None) -> Array:
    """Returns base-2 scores (keys, queries) of one head, fp32; UNSEEN where the mask says so. The head's width is axis
    `key_axis` of the keys.
    """
    scores = _dot(key, query, key_axis, 0) * (static.scale * _LOG2E)
    return scores if mask is None else jnp.where(mask, scores, UNSEEN)


def _gradients(static: Static, head: int, q, key, value, d_out, lse, delta, mask) -> tuple[Array, Array]:
    """Returns softmax weights and the gradients of the scaled scores, (block_kv, block_q) fp32."""
    row = slice(head, head + 1)
    # The forward pass's weights again, from its log-sum-exp: nothing of size (queries, keys) was kept.
    weights = jnp.exp2(_scores(static, key, 0, q[head], mask) - lse[row])
    return weights, weights * (_dot(value, d_out[head], 0, 0) - delta[row])


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiplies matrices over one axis of each, summed in fp32; fp32 inputs are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
