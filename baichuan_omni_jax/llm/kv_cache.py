"""The key and value cache of a decoder: a static length, filled row by row.

Entry i of a row is the item at position i, so rows are filled, freed and filled again without regard to each other, and
nothing says which entries hold something: an item sees entries 0 to its own position, all of which its row has written.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks
from baichuan_omni_jax.nn.linear import as_bits, from_bits
from baichuan_omni_jax.nn.param import ComputePolicy, split_as
from baichuan_omni_jax.sharding import check_divisible

# Heads before length, so that a head's entries lie side by side: what both products of attention read.
ENTRIES = ("batch", "act_kv_heads", None, None)


class LayerCache(NamedTuple):
    """Keys and values (b, k, s, h) of one layer; in int8 with fp32 scales (b, k, s), else the scales are None."""

    k: Array
    v: Array
    k_scale: Array | None
    v_scale: Array | None


class KVCache(NamedTuple):
    """Keys and values of every layer. A step takes it and gives it back: donate it, and it is written in place."""

    layers: tuple[LayerCache, ...]

    @property
    def batch(self) -> int:
        return self.layers[0].k.shape[0]

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.layers[0].k.shape[2]

    @property
    def bytes(self) -> int:
        """Of all devices together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def init_cache(cfg: LLMConfig, batch: int, length: int, dtype: DTypeLike, compute: ComputePolicy) -> KVCache:
    """Makes an empty cache, rows split over data x fsdp, heads over `tensor`.

    Args:
        cfg: the language model's sizes.
        batch: rows.
        length: positions of a row.
        dtype: a float type, or int8: each entry's head then has a scale of its own, its largest value / 127.
        compute: says how arrays are split.

    Raises:
        ConfigError: the mesh does not divide rows or heads.
    """
    shape = (batch, cfg.num_kv_heads, length, cfg.head_dim)
    # Before anything is allocated, so that the error names the dimension that the mesh does not divide.
    check_divisible(jax.sharding.get_abstract_mesh(), compute.rules, shape[:2], ENTRIES[:2], "the cache")

    def zeros(dims: int, dtype: DTypeLike) -> Array:
        return jnp.zeros(shape[:dims], dtype, out_sharding=compute.rules.spec(*ENTRIES[:dims]))

    def layer() -> LayerCache:
        # Float types have no scales: with None in their place programs carry no dummy arrays.
        scaled = jnp.dtype(dtype) == jnp.int8
        scales = (zeros(3, jnp.float32) if scaled else None for _ in "kv")
        return LayerCache(zeros(4, dtype), zeros(4, dtype), *scales)

    return KVCache(tuple(layer() for _ in range(cfg.num_layers)))


def write(
    cache: LayerCache, k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], positions: Int32[Array, "b t"]
) -> LayerCache:
    """Writes each item's key and value at its position; nothing is written for position -1 or past the end.

    Of one device's rows and heads: call it inside shard_map. A row's positions must differ.
    """
    b, _, heads, _ = k.shape
    # A head's entry at a time: written for all heads at once, they would have to lie side by side, and a TPU would copy
    # the whole cache to make them.
    rows, heads = jnp.arange(b)[:, None, None], jnp.arange(heads)
    # A negative index would count from the end.
    places = jnp.where(positions < 0, cache.k.shape[2], positions)[:, :, None]

    def put(entries: Shaped[Array, "b k s ..."], new: Shaped[Array, "b t k ..."]) -> Array:
        written = as_bits(entries).at[rows, heads, places].set(as_bits(new.astype(entries.dtype)), mode="drop")
        return from_bits(written, entries.dtype)

    if cache.k_scale is None or cache.v_scale is None:
        return LayerCache(put(cache.k, k), put(cache.v, v), None, None)
    # Quantized once, when it is written, by a scale of its own: no later entry changes an earlier one.
    (k, k_scale), (v, v_scale) = _quantize(k), _quantize(v)
    return LayerCache(put(cache.k, k), put(cache.v, v), put(cache.k_scale, k_scale), put(cache.v_scale, v_scale))


def read(cache: LayerCache, dtype: DTypeLike) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """Returns all keys and values, in `dtype`, in the order of attention's arguments."""

    def values(entries: Array, scale: Array | None) -> Array:
        # int8 is scaled in fp32 and then narrowed; heads go behind the length, as the kernel takes them.
        wide = entries.astype(dtype) if scale is None else (entries * scale[..., None]).astype(dtype)
        return wide.swapaxes(1, 2)

    return values(cache.k, cache.k_scale), values(cache.v, cache.v_scale)


def attend(
    q: Float[Array, "b k g h"], cache: LayerCache, positions: Int32[Array, " b"], scale: float
) -> Float[Array, "b k g h"]:
    """Attends with one item a row over the row's entries up to its position. Position -1 gives zeros.

    Of one device's rows and heads: call it inside shard_map.
    """
    # Scores, summed in fp32. An int8 entry's scale is the same for all of its values, so it multiplies the products.
    wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = wide("bkgh,bksh->bkgs", q, cache.k.astype(q.dtype)) * scale
    if cache.k_scale is not None:
        scores *= cache.k_scale[:, :, None]
    # Softmax in fp32 over the entries that the row has written; a row without any divides by 1.
    seen = jnp.arange(cache.k.shape[2]) <= positions[:, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True, initial=-1e30))
    total = weights.sum(-1, keepdims=True)
    # Scales of the values go onto the weights, one number an entry; their sum was taken without them.
    if cache.v_scale is not None:
        weights *= cache.v_scale[:, :, None]
    out = wide("bkgs,bksh->bkgh", weights.astype(q.dtype), cache.v.astype(q.dtype))
    # Divided after the product: a head's width of numbers, instead of the cache's length.
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)


def attend_with_cache(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    positions: Int32[Array, "b t"],
    cache: LayerCache,
    segments: Segments | None,
    plan: BlockPlan | None,
    compute: ComputePolicy,
    scale: float,
) -> tuple[Float[Array, "b t n h"], LayerCache]:
    """Writes the items' keys and values, then attends over the rows' entries.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        positions: where each item stands in its row, -1 at padding.
        cache: the layer's entries.
        segments: what each item sees of the entries (`visible_entries`); None for one item a row.
        plan: the blocks of `segments`; None with it.
        compute: says how arrays are split, and which kernel a prefill takes.
        scale: of the scores.

    Returns:
        The attended values, zeros at padding where there is one item a row, and the cache with the items in it.
    """
    spec = compute.rules.spec
    heads, kv_heads = spec("batch", None, "act_heads", None), spec("batch", None, "act_kv_heads", None)
    # Whole over `context`, as the cache is; free where rows are not split over it.
    q, k, v = _placed(q, heads), _placed(k, kv_heads), _placed(v, kv_heads)
    stored = jax.tree.map(lambda entries: jax.typeof(entries).sharding.spec, cache)

    # Rows and heads have nothing to do with each other, so writing and one item's products are done where they lie.
    @partial(jax.shard_map, out_specs=(heads, stored))
    def store(q, k, v, positions, cache):
        cache = write(cache, k, v, positions)
        if segments is None:
            b, _, count, h = k.shape
            q = attend(q.reshape(b, count, -1, h), cache, positions[:, 0], scale).reshape(q.shape)
        return q, cache

    # Written before anything is read: an item sees itself, and in a prefill the items before it in the chunk.
    out, cache = store(q, k, v, positions, cache)
    if segments is not None:
        keys, values = read(cache, out.dtype)
        kernel = partial(flash_attention, implementation=compute.attention)
        out = kernel(out, keys, values, segments=segments, plan=plan, causal=True, scale=scale)
    return _placed(out, spec("batch", "length", "act_heads", None)), cache


def _placed(x: Array, spec: PartitionSpec) -> Array:
    """As `reshard`, but no operation at all where nothing changes: these stand in every layer of every step."""
    return x if jax.typeof(x).sharding.spec == spec else reshard(x, spec)


def visible_entries(positions: Int32[Array, "b t"], length: int, compute: ComputePolicy) -> tuple[Segments, BlockPlan]:
    """What a prefill's items see of a cache of `length` entries: the row's, up to their own position."""
    entries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (positions.shape[0], length))
    entries = split_as(entries, compute, "batch")
    # Later entries are of segment 0: they may be left over from a request that had the row before.
    filled = entries <= positions.max(1, keepdims=True)
    segments = Segments((positions >= 0).astype(jnp.int32), positions, filled.astype(jnp.int32), entries)
    return segments, plan_blocks(segments, causal=True)


def _quantize(x: Float[Array, "b t k h"]) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k"]]:
    wide = x.astype(jnp.float32)
    # Symmetric, so that a scale alone restores it; an entry of zeros has scale 0 and is divided by 1.
    scale = jnp.max(jnp.abs(wide), -1) / 127
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None]), scale
