"""Attention on TPU: the kernels' layout, the memory that they take, their derivative, and what they cannot compute.

The kernels want tokens last, (b, heads, h, t). XLA lets the projections write and read that layout directly, so the
transposes here move nothing. The kernels are in `pallas_tpu_kernels.py`.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from baichuan_omni_jax.kernels.flash_attention.pallas_tpu_grid import Static, Visits
from baichuan_omni_jax.kernels.flash_attention.pallas_tpu_kernels import UNSEEN, backward_dkv, backward_dq, forward
from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan, Segments, named

# v5e and v6e have 128 MiB of VMEM a core, v5p and 7x 64.
VMEM_LIMIT_BYTES = 48 * 2**20
_BLOCKS_BYTES = 20 * 2**20  # of it for blocks and sums; scores and what the compiler spills take the rest
# int32, prefetched to the 1 MiB of scalar memory.
MAX_PAIRS = 160 * 1024
_MAX_HEADS = 8  # query heads a step: more only lengthen the unrolled program


def kv_heads_a_step(kv_heads: int, group: int, head_dim: int, block_q: int, block_kv: int, dtype: DTypeLike) -> int:
    """Returns how many key heads (with their query heads) share a grid step, its mask and its overhead.

    The backward kernels decide: q, d_out and dq, k, v and their gradients, double-buffered, and fp32 sums.

    Args:
        kv_heads: key heads of one device, which the result divides.
        group: query heads a key head.
        head_dim: numbers a head.
        block_q: tokens a block of queries.
        block_kv: tokens a block of keys.
        dtype: of the arrays.
    """
    size = jnp.dtype(dtype).itemsize
    a_query, a_key = 3 * 2 * size + 4, 4 * 2 * size + 2 * 4
    a_head = head_dim * (group * block_q * a_query + block_kv * a_key)
    fits = max(1, min(_BLOCKS_BYTES // a_head, _MAX_HEADS // group))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fits)


_LANES = 128  # tokens lie on lanes


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

    `interpret` runs the kernels as plain JAX, on any platform, for tests.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    group = n // kv_heads
    a_step = kv_heads_a_step(kv_heads, group, h, plan.block_q, plan.block_kv, q.dtype)
    static = Static(plan.causal, scale, plan.block_q, plan.block_kv, a_step, group, VMEM_LIMIT_BYTES, interpret)

    def tokens_last(x: Array, block: int) -> Array:
        x = _padded(x, block).transpose(0, 2, 3, 1)
        return x.reshape(b, kv_heads // a_step, -1, *x.shape[2:])

    # Heads are grouped as a grid step takes them, tokens padded to whole blocks.
    arrays = (
        tokens_last(q, plan.block_q),
        tokens_last(k, plan.block_kv),
        tokens_last(v, plan.block_kv),
        # Padding's id is 0 among the keys and -1 among the queries: it sees nothing, not even other padding.
        _tokens(jnp.where(segments.q_ids > 0, segments.q_ids, -1), segments.q_pos, plan.block_q),
        _tokens(segments.kv_ids, segments.kv_pos, plan.block_kv),
        (plan.by_query[:, 0], plan.by_key[:, 0], plan.count[:, 0]),
    )
    if plan.by_query.size > MAX_PAIRS:
        # Scalar memory holds the pairs of so many rows: row by row beyond.
        results = lax.map(
            lambda row: jax.tree.map(lambda x: x[0], _attend(static, *jax.tree.map(lambda x: x[None], row))), arrays
        )
    else:
        results = _attend(static, *arrays)
    out, lse = cast(tuple[Array, Array], results)  # custom_vjp hides the type
    # Back to (b, t, n, h), without the padding.
    out = out.reshape(b, n, h, -1).transpose(0, 3, 1, 2)[:, :t]
    return out, lse.reshape(b, n, -1).transpose(0, 2, 1)[:, :t]


def unsupported(q: Array, k: Array, plan: BlockPlan) -> str | None:
    """Returns why the kernels cannot compute these; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"only bfloat16 and float32, not {q.dtype}"
    if q.shape[3] % 16:
        return f"the head dim must be a multiple of 16, not {q.shape[3]}"
    if plan.block_q % _LANES or plan.block_kv % _LANES:
        return f"blocks must be multiples of {_LANES}, not {plan.block_q} x {plan.block_kv}"
    if plan.by_query.shape[-1] > MAX_PAIRS:
        return f"{plan.by_query.shape[-1]} block pairs a row; {MAX_PAIRS} fit scalar memory. Use larger blocks"
    return None


def _padded(x: Array, block: int) -> Array:
    """Adds zeros up to whole blocks of tokens (axis 1)."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _tokens(ids: Array, positions: Array, block: int) -> Array:
    """Stacks ids, positions and zeros to (b, 8, t), one tile of sublanes."""
    ids, positions = _padded(ids, block), _padded(positions, block)
    return jnp.stack([ids, positions] + [jnp.zeros_like(ids)] * 6, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q, k, v, q_tokens, kv_tokens, pairs):
    return _forward(static, q, k, v, q_tokens, kv_tokens, pairs)[0]


def _forward(static: Static, q, k, v, q_tokens, kv_tokens, pairs):
    by_query, _, count = pairs
    out, lse = named(*forward(static, Visits.from_pairs(by_query, count), q, k, v, q_tokens, kv_tokens))
    return (out, lse), (q, k, v, q_tokens, kv_tokens, pairs, out, lse)


def _backward(static: Static, saved, cotangents):
    *arrays, pairs, out, lse = saved
    d_out, d_lse = cotangents
    by_query, by_key, count = pairs
    # d(score) = p * (d_out . v - delta), where the log-sum-exp's own cotangent enters as +p * d_lse.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), 3) - d_lse
    # In base 2; and such that a query that sees nothing gets weights of 0.
    lse = jnp.where(lse > UNSEEN, lse * jnp.log2(jnp.e), -UNSEEN)
    arrays += [d_out, lse, delta]
    d_q = backward_dq(static, Visits.from_pairs(by_query, count), *arrays)
    d_k, d_v = backward_dkv(static, Visits.from_pairs(by_key, count), *arrays)
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_forward, _backward)
