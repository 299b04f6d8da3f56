"""Media embeddings into their slots of the row, and hidden states out of the slots that predict audio.

Media arrays are split over (context, tensor), rows over context: each embedding is gathered once and every shard keeps
those that fall into its own part. A row of 8 slots on two shards, index [1, 6, 8] (8 = unused):

    shard 0 has slots 0..3 and writes embedding 0 to its slot 1; shard 1 has 4..7 and writes embedding 1 to its slot 2
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Shaped

from baichuan_omni_jax.sharding import ShardingRules

# What holds on one device without a mesh.
UNSPLIT = ShardingRules.unsplit()


def merge_media(
    x: Float[Array, "b t d"], parts: Sequence[tuple[Array, Array]], rules: ShardingRules, axis: str = "media"
) -> Float[Array, "b t d"]:
    """Puts media embeddings in the place of their slots: `x[b, index[b, m]] = media[b, m]`.

    Args:
        x: embeddings of the row's tokens.
        parts: media (b, m, d) with their slots (b, m), for each kind of media; t or more is no slot.
        rules: how rows and media are split over devices.
        axis: the logical axis that m is split as.

    Returns:
        The embeddings with the media among them, split as `x`.
    """
    rules = _rules_of(x, rules)
    row, part = _specs(rules, axis)

    def merge_shard(x, parts):
        # One gather of all media together; each shard then keeps what falls into its own slots.
        media = _gather(jnp.concatenate([media for media, _ in parts], 1), rules, axis)
        index = _gather(jnp.concatenate([index for _, index in parts], 1), rules, axis)
        local = _local_slots(index, x.shape[1], rules)
        return jax.vmap(lambda row, slots, values: row.at[slots].set(values, mode="drop"))(x, local, media)

    with jax.named_scope("merge_media"):
        parts = [(media.astype(x.dtype), index) for media, index in parts]
        return _sharded(merge_shard, x, (row, [(part, part)] * len(parts)), row)(x, parts)


def pick_slots(
    hidden: Shaped[Array, "b t d"], index: Int32[Array, "b m"], rules: ShardingRules, axis: str = "media"
) -> Shaped[Array, "b m d"]:
    """Picks `hidden[b, index[b, m]]`, m split as the logical axis `axis`, as the index is; zeros where the index is
    unused (t or more).
    """
    rules = _rules_of(hidden, rules)
    row, part = _specs(rules, axis)
    context = rules.axes("length")

    def pick_shard(hidden, index):
        # The index first: it is small, and every shard must know which of its states the others ask for.
        whole = _gather(index, rules, axis)
        local = _local_slots(whole, hidden.shape[1], rules)
        pick = lambda row, slots: row.at[slots].get(mode="fill", fill_value=0)  # noqa: E731
        picked = jax.vmap(pick)(hidden, local)
        # A state is zero on all shards but its own: the sum over shards is the state, scattered where media lie.
        for name in context:
            if name in rules.axes(axis):
                picked = lax.psum_scatter(picked, name, scatter_dimension=1, tiled=True)
            else:
                picked = lax.psum(picked, name)
        # Over the other media axes all devices hold the same states, so a slice splits them, without communication.
        return _own_part(picked, [name for name in rules.axes(axis) if name not in context])

    with jax.named_scope("pick_slots"):
        return _sharded(pick_shard, hidden, (row, part), part)(hidden, index)


def segments_with_media(
    segment_ids: Int32[Array, "b t"], indexes: Sequence[Array], rules: ShardingRules
) -> Bool[Array, "b t"]:
    """Tells whether a token's segment (a document) has a slot of `indexes` (b, m); False at padding (id 0).

    Ids [1, 1, 2, 2, 0] and one index [0, 5] give [True, True, False, False, False].
    """
    if not indexes:
        return segment_ids < 0
    rules = _rules_of(segment_ids, rules)
    row, part = _specs(rules, "media")
    context, length = rules.axes("length"), segment_ids.shape[1]

    def mark_shard(segment_ids, indexes):
        # All slots in one gather, as in the merge; each shard then marks the segments of its own.
        index = _gather(jnp.concatenate(indexes, 1), rules, "media")
        local = _local_slots(index, segment_ids.shape[1], rules)

        def mark_row(ids, slots):
            # A row has at most as many segments as tokens.
            filled = jnp.zeros(length + 1, jnp.int32).at[ids.at[slots].get(mode="fill", fill_value=0)].set(1)
            # A document may cross shards: what one of them found holds for all. Id 0 is padding, never marked.
            return (lax.pmax(filled, context) if context else filled).at[0].set(0)[ids] > 0

        return jax.vmap(mark_row)(segment_ids, local)

    return _sharded(mark_shard, segment_ids, (row, [part] * len(indexes)), row)(segment_ids, list(indexes))


def _rules_of(x: Array, rules: ShardingRules) -> ShardingRules:
    """Returns `rules`, or ones that split nothing where `x` is on no mesh."""
    return UNSPLIT if jax.typeof(x).sharding.mesh.empty else rules


def _specs(rules: ShardingRules, axis: str) -> tuple[P, P]:
    return rules.spec("batch", "length"), rules.spec("batch", axis)


def _gather(x: Array, rules: ShardingRules, axis: str) -> Array:
    return lax.all_gather(x, rules.axes(axis), axis=1, tiled=True) if rules.axes(axis) else x


def _local_slots(index: Array, local: int, rules: ShardingRules) -> Array:
    """Slots counted from this shard's first; `local` (dropped) for those of other shards."""
    axes = rules.axes("length")
    slot = index - lax.axis_index(axes) * local if axes else index
    return jnp.where((slot >= 0) & (slot < local), slot, local)


def _own_part(x: Array, axes: list[str]) -> Array:
    """This device's part along `axes` of an array that is the same on all of them."""
    for axis in axes:
        size = x.shape[1] // lax.axis_size(axis)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, 1)
    return x


def _sharded(function, like: Array, in_specs, out_specs):
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty:
        return function
    # Gathered arrays are equal on all devices, but their type says that they vary: the check would refuse them.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
