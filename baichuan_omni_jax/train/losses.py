"""Cross-entropies over packed rows, as sums: the caller divides by weights of the whole global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.nn.chunking import split_chunks
from baichuan_omni_jax.sharding import ShardingRules


def cross_entropy(logits: Float[Array, "... v"], targets: Int32[Array, "..."]) -> Float[Array, "..."]:
    """-log softmax(logits)[target] in fp32. The target is picked by comparison: `v` may be split over devices."""
    logits = logits.astype(jnp.float32)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    spec = jax.typeof(logits).sharding
    classes = jax.sharding.reshard(classes, spec) if not spec.mesh.empty else classes
    picked = jnp.where(classes == targets[..., None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, -1) - picked


def chunked_cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int32[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    chunk: int,
    rules: ShardingRules,
) -> Float[Array, ""]:
    """Sum over positions of weight * cross-entropy of `hidden @ head.T`.

    Logits of `chunk` positions a row and shard are in memory at a time, forward and backward (each is recomputed).
    """

    @jax.checkpoint
    def add(total, piece):
        x, target, weight = piece
        with jax.named_scope("logits"):
            spec = rules.spec("batch", "length", "act_vocab")
            logits = jnp.einsum("bpd,vd->bpv", x, head, out_sharding=spec, preferred_element_type=jnp.float32)
        return total + (cross_entropy(logits, target) * weight).sum(), None

    pieces = tuple(split_chunks(x, chunk, rules) for x in (hidden, targets, weights))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)
    return total
