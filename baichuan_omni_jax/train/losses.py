"""Cross-entropies of packed rows, position by position: the caller weighs and sums them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.llm.special_rows import ROWS
from baichuan_omni_jax.nn.linear import Gathered, product
from baichuan_omni_jax.nn.remat import split_parts
from baichuan_omni_jax.sharding import ShardingRules, axis_product

# The logit of what cannot be chosen: finite, as a piece of the vocabulary may hold nothing else.
_NEVER = -1e30


class SpecialHead(NamedTuple):
    """Rows (n, d) that stand in for the head's rows `ids`."""

    ids: tuple[int, ...]
    weight: Gathered


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
    *,
    chunk: int,
    rules: ShardingRules,
    weight_of: Callable[[Array], Gathered],
    special: SpecialHead | None = None,
) -> Float[Array, "b t"]:
    """Cross-entropy of each position, fp32, from the logits `hidden @ weight_of(head).T`.

    Goes over the vocabulary in pieces: only as many logits are in memory as `chunk` positions of a row and shard have,
    forward and backward (each is recomputed), and only a piece of the head, as stored, is gathered by `weight_of`.
    Its gradient is fp32 from the product on. `special` has rows that stand in for some of the head's.
    """
    pieces = _pieces(hidden, head, chunk, rules)
    names = jax.sharding.reshard(jnp.arange(head.shape[0], dtype=jnp.int32), rules.spec("vocab"))
    if special is not None:
        # No target is -1: such a row is neither a rival nor picked.
        names = jnp.where((names[:, None] == jnp.asarray(special.ids)).any(-1), -1, names)
    # fp32 here, so that the pieces' gradients are summed in fp32.
    wide = hidden.astype(jnp.float32)

    @jax.checkpoint
    def piece(wide, rows, names):
        with jax.named_scope("logits"):
            weight, spec = weight_of(rows), rules.spec("batch", "length", "act_vocab")
            x = wide.astype(hidden.dtype)
            logits = product("btd,vd->btv", x, weight, out=spec, dtype=jnp.float32)
            logits = logits if special is None else jnp.where(names < 0, _NEVER, logits)
        picked = jnp.where(names == targets[..., None], logits, 0.0).sum(-1)
        return jax.nn.logsumexp(logits, -1), picked

    rows = split_parts(head, pieces), split_parts(names, pieces)
    _, (totals, picked) = jax.lax.scan(lambda _, rows: (None, piece(wide, *rows)), None, rows)
    if special is None:
        return jax.nn.logsumexp(totals, 0) - picked.sum(0)
    x, spec = wide.astype(hidden.dtype), rules.spec("batch", "length", None)
    logits = product("btd,nd->btn", x, special.weight, out=spec, dtype=jnp.float32)
    own = jnp.where(jnp.asarray(special.ids) == targets[..., None], logits, 0.0).sum(-1)
    total = jnp.logaddexp(jax.nn.logsumexp(totals, 0), jax.nn.logsumexp(logits, -1))
    return total - picked.sum(0) - own


def text_entropies(
    llm: LanguageModel, hidden: Float[Array, "b t d"], targets: Int32[Array, "b t"], chunk: int
) -> Float[Array, "b t"]:
    """Cross-entropy of each position under the language model's head, in pieces as `chunked_cross_entropy`."""
    rows, special = llm.special_rows, None
    if rows is not None and rows.head is not None:
        special = SpecialHead(rows.ids, llm.head_weight(rows.head, axes=ROWS))
    return chunked_cross_entropy(
        hidden,
        llm.head[...],
        targets,
        chunk=chunk,
        rules=llm.compute.rules,
        weight_of=llm.head_weight,
        special=special,
    )


def _pieces(hidden: Array, head: Array, chunk: int, rules: ShardingRules) -> int:
    """The fewest equal pieces of a shard's vocabulary whose logits are no more than those of `chunk` positions."""
    mesh = jax.typeof(hidden).sharding.mesh
    shards = lambda name: 1 if mesh.empty else axis_product(mesh, rules.axes(name))  # noqa: E731
    vocabulary, positions = head.shape[0] // shards("vocab"), hidden.shape[1] // shards("length")
    divisors = (n for n in range(1, vocabulary + 1) if vocabulary % n == 0)
    return next(n for n in divisors if n * chunk >= positions or n == vocabulary)
