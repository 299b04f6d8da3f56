"""The language model with a cache: the same numbers as `LanguageModel`, item by item or many items at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.kernels.backends import platform_of
from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks
from baichuan_omni_jax.llm.kv_cache import KVCache, LayerCache, attend, read, write
from baichuan_omni_jax.llm.model import DecoderLayer, LanguageModel
from baichuan_omni_jax.nn.layers import RMSNorm, rope_angles, rotate
from baichuan_omni_jax.nn.linear import Linear, as_bits, from_bits
from baichuan_omni_jax.nn.param import ComputePolicy, split_as, use

STREAM = ("batch", None, None)
HEADS = ("batch", None, "act_heads", None)
HIDDEN = ("batch", None, "act_mlp")


class DecodeLayer(NamedTuple):
    """One layer's weights. Every matrix has two dims, the contracted one last: XLA's CPU product copies others first.

    A TPU's product takes either order as it lies; whole heads of one key head stay together, so `tensor` can split qkv.
    Shapes: qkv (k (g + 2) h, d), per key head the projections of its g query heads, its key and its value; qkv_bias
    (k (g + 2) h); out (d, n h); gate, up (f, d); down (d, f).
    """

    attention_norm: RMSNorm
    qkv: Array
    qkv_bias: Array
    out: Array
    mlp_norm: RMSNorm
    gate: Array
    up: Array
    down: Array


class DecodeWeights(NamedTuple):
    """Shapes: embedding and head (v, d)."""

    embedding: Array
    layers: tuple[DecodeLayer, ...]
    norm: RMSNorm
    head: Array


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["cfg", "compute"])
class DecodeModel:
    """A `LanguageModel`'s weights as decoding reads them, each once for every token.

    Layers are unstacked (a scan over stacked weights copies each before use on a CPU), weights are cast, and Q, K and V
    are one matrix. Weights are whole over `data`, `fsdp` and `context` and split over `tensor`, so that nothing but
    activations travels between devices.
    """

    def __init__(self, weights: DecodeWeights, cfg: LLMConfig, compute: ComputePolicy):
        self.weights, self.cfg, self.compute = weights, cfg, compute

    @classmethod
    def of(cls, llm: LanguageModel, dtype: DTypeLike | None = None) -> "DecodeModel":
        """The same model in `dtype` (default: the compute dtype).

        Costs the language model's size in `dtype` once more; where they need no change (same dtype, nothing split over
        `fsdp`, no NormHead), embedding and head are shared. Drop `llm` after it where nothing else needs it.
        """
        compute = replace(llm.compute, dtype=jnp.dtype(dtype or llm.compute.dtype))
        layers = tuple(_unstack(llm.layers, jnp.int32(i), llm.cfg, compute) for i in range(llm.cfg.num_layers))
        head = llm.head_weight(dtype=compute.dtype).value if llm.cfg.use_norm_head else _whole(llm.head, compute)
        weights = DecodeWeights(_whole(llm.embedding, compute), layers, llm.norm, head)
        return cls(weights, llm.cfg, compute)

    def embed(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token embeddings in the compute dtype."""
        tokens = split_as(tokens, self.compute, "batch")
        table = as_bits(self.weights.embedding)
        return from_bits(table.at[tokens].get(out_sharding=self.compute.rules.spec(*STREAM)), self.compute.dtype)

    def __call__(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], cache: KVCache
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """Hidden states after the final norm of b rows' next t items, and the cache with those items in it.

        An item sees its row's cache up to its own position. Position -1 is padding: nothing is written, its output is
        zero. A row's positions must differ, and go on where its entries end (or begin again at 0: the row is a new
        one). Nothing is written at positions past the cache's length: the caller ends such rows before.

        Rows of 3, 1 and 0 items in a prefill of t = 4, then a step (t = 1) of all rows but the last:

            positions   0  1  2 -1      3
                        0 -1 -1 -1      1
                       -1 -1 -1 -1     -1
        """
        x, positions = split_as(x, self.compute, "batch"), split_as(positions, self.compute, "batch")
        seen = _seen(positions, cache.length, self.compute) if x.shape[1] > 1 else None
        layers = []
        for weights, entries in zip(self.weights.layers, cache.layers, strict=True):
            with jax.named_scope("attention"):
                mixed, entries = self._attention(weights, weights.attention_norm(x), positions, entries, seen)
                x, layers = x + mixed, [*layers, entries]
            with jax.named_scope("mlp"):
                x = x + self._mlp(weights, weights.mlp_norm(x))
        x = jnp.where(positions[..., None] < 0, 0, self.weights.norm(x))
        return x, KVCache(tuple(layers))

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """fp32 logits."""
        hidden = split_as(hidden.astype(self.compute.dtype), self.compute, "batch")
        spec = self.compute.rules.spec("batch", *[None] * (hidden.ndim - 2), "act_vocab")
        return _project(hidden, self.weights.head, spec, jnp.float32)

    def _attention(
        self,
        weights: DecodeLayer,
        x: Float[Array, "b t d"],
        positions: Int32[Array, "b t"],
        entries: LayerCache,
        seen: tuple[Segments, BlockPlan] | None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        spec, scale = self.compute.rules.spec, self.cfg.head_dim**-0.5
        split = spec("batch", None, "act_kv_heads")
        qkv = _project(x, weights.qkv, split) + weights.qkv_bias
        cached = jax.tree.map(lambda entries: jax.typeof(entries).sharding.spec, entries)

        # Rows and heads have nothing to do with each other, so all of this is done where they lie.
        @partial(jax.shard_map, out_specs=(spec(*HEADS), cached))
        def store(qkv, positions, entries):
            b, t, _ = qkv.shape
            k, h = entries.k.shape[1], self.cfg.head_dim
            qkv = qkv.reshape(b, t, k, -1, h)
            q, key = qkv[:, :, :, :-2].reshape(b, t, -1, h), qkv[:, :, :, -2]
            angles = rope_angles(jnp.maximum(positions, 0), h, self.cfg.rope_theta)
            entries = write(entries, rotate(key, angles), qkv[:, :, :, -1], positions)
            q = rotate(q, angles)
            if seen is None:
                q = attend(q.reshape(b, k, -1, h), entries, positions[:, 0], scale).reshape(q.shape)
            return q, entries

        out, entries = store(qkv, positions, entries)
        if seen is not None:
            segments, plan = seen
            keys, values = read(entries, out.dtype)
            door = partial(flash_attention, implementation=self.compute.attention)
            out = door(out, keys, values, segments=segments, plan=plan, causal=True, scale=scale)
        out = jnp.reshape(out, (*x.shape[:2], -1), out_sharding=split)
        return _project(out, weights.out, spec(*STREAM)), entries

    def _mlp(self, weights: DecodeLayer, x: Array) -> Array:
        spec = self.compute.rules.spec
        hidden = jax.nn.silu(_project(x, weights.gate, spec(*HIDDEN))) * _project(x, weights.up, spec(*HIDDEN))
        return _project(hidden, weights.down, spec(*STREAM))


def _project(
    x: Float[Array, "... i"], weight: Float[Array, "o i"], spec: PartitionSpec, dtype: DTypeLike | None = None
) -> Float[Array, "... o"]:
    """`weight` times every row of `x`, summed in fp32, in `dtype` (default: that of `x`), split as `spec` says."""
    dtype = x.dtype if dtype is None else dtype
    alone = x.size == x.shape[-1] and jax.typeof(x).sharding.mesh.size == 1
    if alone and weight.dtype == jnp.bfloat16 and platform_of(x) == "cpu":
        return jax.shard_map(_sum_of_products, out_specs=spec, check_vma=False)(x, weight).astype(dtype)
    contracted = ((x.ndim - 1,), (1,))
    out = jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32, out_sharding=spec)
    return out.astype(dtype)


def _sum_of_products(x: Float[Array, "... i"], weight: Float[Array, "o i"]) -> Float[Array, "... o"]:
    """A matrix times one row: ten times as fast as XLA's CPU product in bf16, which casts the whole matrix first."""
    # Bound to the row, or the cast would be taken out of a loop over tokens, and all weights held in fp32.
    x, weight = jax.lax.optimization_barrier((x, weight))
    wide = weight.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
    return wide.sum(-1).reshape(*x.shape[:-1], -1)


def _seen(positions: Int32[Array, "b t"], length: int, compute: ComputePolicy) -> tuple[Segments, BlockPlan]:
    """What a prefill's items see of a cache of `length` entries: the row's, up to their own position."""
    entries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (positions.shape[0], length))
    entries = split_as(entries, compute, "batch")
    filled = entries <= positions.max(1, keepdims=True)
    segments = Segments((positions >= 0).astype(jnp.int32), positions, filled.astype(jnp.int32), entries)
    return segments, plan_blocks(segments, causal=True)


def _whole(variable: nnx.Variable, compute: ComputePolicy) -> Array:
    """As `use`, but the very same buffer where it already is so."""
    return jax.device_put(variable[...].astype(compute.dtype), compute.rules.gathered_spec(*variable.axes))


@partial(jax.jit, static_argnums=(2, 3))
def _unstack(layers: DecoderLayer, index: Int32[Array, ""], cfg: LLMConfig, compute: ComputePolicy) -> DecodeLayer:
    """Layer `index` of the stacked layers."""
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers)
    attention, mlp = layer.attention, layer.mlp
    spec = compute.rules.gathered_spec

    def grouped(linear: Linear) -> tuple[Array, Array]:
        """Weight (k, g, h, d) and bias (k, g, h): heads by the key head that they share."""
        weight, bias = jnp.moveaxis(use(linear.weight, compute), 0, -1), use(linear.bias, compute)
        shape = (cfg.num_kv_heads, -1, *weight.shape[1:])
        weight = jnp.reshape(weight, shape, out_sharding=spec("kv_heads", None, None, None))
        return weight, jnp.reshape(bias, shape[:-1], out_sharding=spec("kv_heads", None, None))

    def joined(parts: Sequence[Array], *rest: int) -> Array:
        return jnp.reshape(jnp.concatenate(parts, 1), (-1, *rest), out_sharding=spec("kv_heads", *[None] * len(rest)))

    weights, biases = zip(*map(grouped, (attention.q_proj, attention.k_proj, attention.v_proj)), strict=True)
    out = use(attention.o_proj.weight, compute)
    out = jnp.reshape(out, (-1, cfg.hidden_size), out_sharding=spec("heads", None)).T
    gate, up, down = (use(linear.weight, compute).T for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    qkv = joined(weights, cfg.hidden_size)
    return DecodeLayer(layer.attention_norm, qkv, joined(biases), out, layer.mlp_norm, gate, up, down)
