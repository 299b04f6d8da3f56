"""Cross-entropies over packed rows, as sums: the caller divides by weights of the whole global batch."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.sharding import ShardingRules, axis_product


def cross_entropy(logits: Float[Array, "... v"], targets: Int32[Array, "..."]) -> Float[Array, "..."]:
    """-log softmax(logits)[target] in fp32. The target's logit is picked by comparison: `v` may be split over devices."""
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
    """Sum over positions of weight * cross-entropy of `hidden @ head.T`, with `chunk` positions a row and shard in memory.

    Logits of one chunk live at a time, forward and backward (each is recomputed). The last chunk is cut short by
    choosing the largest chunk that divides a shard's positions.
    """
    mesh = jax.typeof(hidden).sharding.mesh
    length_axes = rules.axes("length")
    shards = 1 if mesh.empty else axis_product(mesh, length_axes)
    local = hidden.shape[1] // shards
    chunk = _largest_divisor(local, chunk)
    split = lambda x: _split(x, shards, local // chunk, chunk, rules)  # noqa: E731

    @jax.checkpoint
    def add(total, piece):
        x, target, weight = piece
        with jax.named_scope("logits"):
            spec = P(rules.spec("batch")[0], rules.spec("length")[0], None, rules.spec("act_vocab")[0])
            logits = jnp.einsum("bscd,vd->bscv", x, head, out_sharding=spec, preferred_element_type=jnp.float32)
        return total + (cross_entropy(logits, target) * weight).sum(), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights)))
    return total


def _split(x: Array, shards: int, chunks: int, chunk: int, rules: ShardingRules) -> Array:
    """(b, t, ...) -> (chunks, b, shards, chunk, ...): every shard works on its own chunk at the same time."""
    batch, length = rules.spec("batch")[0], rules.spec("length")[0]
    spec = P(batch, length)
    x = x.reshape(x.shape[0], shards, chunks, chunk, *x.shape[2:], out_sharding=spec)
    return jnp.moveaxis(x, 2, 0)


def _largest_divisor(length: int, at_most: int) -> int:
    return max(size for size in range(1, min(length, at_most) + 1) if length % size == 0)
