"""What attention over packed rows means: the whole score matrix, masked. The oracle of every other implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from baichuan_omni_jax.kernels.flash_attention.plan import Segments


def visible(segments: Segments, *, causal: bool) -> Bool[Array, "b t s"]:
    """Returns True where a query sees a key: same non-zero id and, if causal, key position <= query position."""
    same = (segments.q_ids[:, :, None] == segments.kv_ids[:, None, :]) & (segments.q_ids[:, :, None] > 0)
    if not causal:
        return same
    return same & (segments.kv_pos[:, None, :] <= segments.q_pos[:, :, None])


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Computes softmax attention in fp32.

    Args:
        q: queries (b, t, n, h).
        k: keys (b, s, k, h); n / k query heads share a key head.
        v: values, like k.
        segments: which tokens see each other.
        causal: whether no key of a later position is seen.
        scale: what scores are multiplied with.

    Returns:
        The result (b, t, n, h) in q's dtype, and the log-sum-exp of the scaled scores (b, t, n) fp32. Queries that see
        nothing give zero and -1e30.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32)) * scale
    mask = visible(segments, causal=causal)[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    # The usual softmax, its maximum floored so that a row without a visible key stays finite.
    top = jnp.max(scores, -1, keepdims=True, initial=-1e30)
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights / safe, v.astype(jnp.float32))
    lse = jnp.where(total > 0, top + jnp.log(safe), -1e30)[..., 0]
    return out.reshape(b, t, n, h).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(b, t, n)
