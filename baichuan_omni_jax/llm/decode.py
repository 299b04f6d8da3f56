"""The language model with a cache: the same numbers as `LanguageModel`, item by item or many items at once."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks
from baichuan_omni_jax.llm.config import LLMConfig
from baichuan_omni_jax.llm.model import DecoderLayer, LanguageModel
from baichuan_omni_jax.nn.cache import KVCache, LayerCache, attend, read, write
from baichuan_omni_jax.nn.norm import RMSNorm
from baichuan_omni_jax.nn.param import Compute, split_as, use
from baichuan_omni_jax.nn.rope import rope_angles, rotate

STREAM = ("batch", None, None)
HEADS = ("batch", None, "act_heads", None)
HIDDEN = ("batch", None, None, "act_mlp")


class DecodeLayer(NamedTuple):
    """One layer's weights, contracted dim last.

    Shapes: qkv (k, g + 2, h, d), per key head the projections of its g query heads, its key and its value; qkv_bias
    (k, g + 2, h); out (d, n, h); gate_up (2, f, d); down (d, f).
    """

    attention_norm: RMSNorm
    qkv: Array
    qkv_bias: Array
    out: Array
    mlp_norm: RMSNorm
    gate_up: Array
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

    Layers are unstacked (a scan over stacked weights copies each before use on a CPU), weights are cast, projections of
    the same input are one matrix, and every matrix has its contracted dim last. Weights are whole over `data`, `fsdp`
    and `context` and split over `tensor`, so that nothing but activations travels between devices.
    """

    def __init__(self, weights: DecodeWeights, cfg: LLMConfig, compute: Compute):
        self.weights, self.cfg, self.compute = weights, cfg, compute

    @classmethod
    def of(cls, llm: LanguageModel, dtype: DTypeLike | None = None) -> "DecodeModel":
        """The same model in `dtype` (default: the compute dtype).

        Costs the language model's size in `dtype` once more; where they need no change (same dtype, nothing split over
        `fsdp`, no NormHead), embedding and head are shared. Drop `llm` after it where nothing else needs it.
        """
        compute = replace(llm.compute, dtype=jnp.dtype(dtype or llm.compute.dtype))
        layers = tuple(_unstack(llm.layers, jnp.int32(i), llm.cfg, compute) for i in range(llm.cfg.num_layers))
        head = llm.head_weight(dtype=compute.dtype) if llm.cfg.use_norm_head else _whole(llm.head, compute)
        weights = DecodeWeights(_whole(llm.embedding, compute), layers, llm.norm, head)
        return cls(weights, llm.cfg, compute)

    def embed(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token embeddings in the compute dtype."""
        tokens = split_as(tokens, self.compute, "batch")
        return self.weights.embedding.at[tokens].get(out_sharding=self.compute.rules.spec(*STREAM))

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
        return jnp.einsum("...d,vd->...v", hidden, self.weights.head, out_sharding=spec).astype(jnp.float32)

    def _attention(
        self,
        weights: DecodeLayer,
        x: Float[Array, "b t d"],
        positions: Int32[Array, "b t"],
        entries: LayerCache,
        seen: tuple[Segments, BlockPlan] | None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        spec, scale = self.compute.rules.spec, self.cfg.head_dim**-0.5
        groups = ("batch", None, "act_kv_heads", None, None)
        qkv = jnp.einsum("btd,kghd->btkgh", x, weights.qkv, out_sharding=spec(*groups)) + weights.qkv_bias
        cached = jax.tree.map(lambda entries: jax.typeof(entries).sharding.spec, entries)

        # Rows and heads have nothing to do with each other, so all of this is done where they lie.
        @partial(jax.shard_map, out_specs=(spec(*HEADS), cached))
        def store(qkv, positions, entries):
            b, t, k, _, h = qkv.shape
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
        return jnp.einsum("btnh,dnh->btd", out, weights.out, out_sharding=spec(*STREAM)), entries

    def _mlp(self, weights: DecodeLayer, x: Array) -> Array:
        spec = self.compute.rules.spec
        both = jnp.einsum("btd,cfd->btcf", x, weights.gate_up, out_sharding=spec(*HIDDEN))
        hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
        return jnp.einsum("btf,df->btd", hidden, weights.down, out_sharding=spec(*STREAM))


def _seen(positions: Int32[Array, "b t"], length: int, compute: Compute) -> tuple[Segments, BlockPlan]:
    """What a prefill's items see of a cache of `length` entries: the row's, up to their own position."""
    entries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (positions.shape[0], length))
    entries = split_as(entries, compute, "batch")
    filled = entries <= positions.max(1, keepdims=True)
    segments = Segments((positions >= 0).astype(jnp.int32), positions, filled.astype(jnp.int32), entries)
    return segments, plan_blocks(segments, causal=True)


def _whole(variable: nnx.Variable, compute: Compute) -> Array:
    """As `use`, but the very same buffer where it already is so."""
    return jax.device_put(variable[...].astype(compute.dtype), compute.rules.gathered_spec(*variable.axes))


@partial(jax.jit, static_argnums=(2, 3))
def _unstack(layers: DecoderLayer, index: Int32[Array, ""], cfg: LLMConfig, compute: Compute) -> DecodeLayer:
    """Layer `index` of the stacked layers."""
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers)
    attention, mlp = layer.attention, layer.mlp

    def grouped(variable: nnx.Variable, *lead: str) -> Array:
        """Of (..., n, h), heads by the key head that they share: (..., k, g, h)."""
        value = use(variable, compute)
        shape = (*value.shape[:-2], cfg.num_kv_heads, -1, cfg.head_dim)
        return jnp.reshape(value, shape, out_sharding=compute.rules.gathered_spec(*lead, "kv_heads", None, None))

    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = jnp.concatenate([grouped(linear.weight, "embed") for linear in inputs], 2)
    bias = jnp.concatenate([grouped(linear.bias) for linear in inputs], 1)
    out = jnp.moveaxis(use(attention.o_proj.weight, compute), -1, 0)
    gate_up = jnp.stack([use(linear.weight, compute).T for linear in (mlp.gate_proj, mlp.up_proj)])
    down = use(mlp.down_proj.weight, compute).T
    return DecodeLayer(layer.attention_norm, jnp.moveaxis(qkv, 0, -1), bias, out, layer.mlp_norm, gate_up, down)
