"""The language model (`model.*`, `lm_head.weight`): a Qwen2.5 shaped decoder, for packed rows and with a cache.

Differs from the released model in form only: heads are an axis of their own, the packed `W_pack` is three projections,
layers are stacked and scanned, and documents of a packed row do not see each other. Media tokens take plain positions.

The same modules train, read prompts and decode: a call with a `KVCache` sees what its rows hold. Weights come in one of
two layouts: `training`, or `decode` (`decode_layout.py`), which `LanguageModel.to_decode_layout` makes of the first.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks, whole_keys
from baichuan_omni_jax.llm.decode_layout import MatrixLinear, decode_layer_values, project, split_heads, whole
from baichuan_omni_jax.llm.kv_cache import KVCache, LayerCache, attend_with_cache, visible_entries
from baichuan_omni_jax.nn.int8 import Dither
from baichuan_omni_jax.nn.layers import RMSNorm, rope_angles, rotate
from baichuan_omni_jax.nn.linear import (
    Gathered,
    Linear,
    SpecialRows,
    as_bits,
    from_bits,
    gather_rows,
    gather_weight,
    look_up,
    narrow,
    product,
)
from baichuan_omni_jax.nn.param import ComputePolicy, gather, normal, split_as, stack, with_values
from baichuan_omni_jax.nn.remat import keepable, map_chunks, remat

STREAM = ("batch", "length", "act_embed")
HEADS = ("batch", "length", "act_heads", None)
KV_HEADS = ("batch", "length", "act_kv_heads", None)
QKV = ("batch", "length", "act_kv_heads")
HIDDEN = ("batch", "length", "act_mlp")

Layout = Literal["training", "decode"]


class RowKeys(NamedTuple):
    """The keys of a row whose tokens see more than the earlier tokens of their own segment.

    Key j is that of the token at `places[:, j]` of the row, so a token's key may stand in several segments: a prefix in
    those of all its continuations. `segments` says which of these s keys each of the row's t tokens sees.
    """

    places: Int32[Array, "b s"]
    segments: Segments


class Attention(nnx.Module):
    """Grouped-query attention with biased Q, K, V and no output bias."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy, layout: Layout = "training"):
        keys = jax.random.split(key, 4)
        d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.o_proj: Any
        if layout == "decode":
            width, axes = (n + 2 * k) * h, ("heads", "embed")
            self.qkv_proj = MatrixLinear(keys[0], (width, d), axes, out=QKV, compute=compute, bias=True)
            self.o_proj = MatrixLinear(keys[3], (d, n * h), ("embed", "heads"), out=STREAM, compute=compute)
        else:
            in_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
            into = "btd,dnh->btnh"
            linear = partial(Linear, compute=compute, int8=compute.int8)
            self.q_proj = linear(keys[0], into, (d, n, h), in_axes, out=HEADS, bias=True)
            self.k_proj = linear(keys[1], into, (d, k, h), kv_axes, out=KV_HEADS, bias=True)
            self.v_proj = linear(keys[2], into, (d, k, h), kv_axes, out=KV_HEADS, bias=True)
            out_axes = ("heads", "head_dim", "embed")
            self.o_proj = linear(keys[3], "btnh,nhd->btd", (n, h, d), out_axes, out=STREAM)
        self.cfg, self.compute, self.layout, self.scale = cfg, compute, layout, h**-0.5

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t half"],
        segments: Segments | None,
        plan: BlockPlan | None,
        positions: Int32[Array, "b t"] | None = None,
        cache: LayerCache | None = None,
        key_places: Int32[Array, "b s"] | None = None,
        dither: Dither | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attends over the row, or over what the cache holds of it.

        Args:
            x: the normalized stream.
            angles: rotary angles of the items' positions.
            segments: what each item sees (of the cache, where there is one); None for a step of one item a row.
            plan: the blocks of `segments`; None with it.
            positions: where the items stand in the cache, -1 at padding; read only with one.
            cache: keys and values of the rows' earlier items.
            key_places: the token that each key of `segments` is taken from (`RowKeys`); None: the row's, in order.
            dither: what gradients of int8 products are rounded with.

        Returns:
            The attention's output, and the cache with the items in it (None without one).
        """
        # Projections, heads as an axis of their own.
        if self.layout == "decode":
            q, k, v = split_heads(self.qkv_proj(x), self.cfg, self.compute)
        else:
            linears = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (linear(x, dither=dither and dither.of(i)) for i, linear in enumerate(linears))
        # Named as the kernels read them, so that what is kept is rotated already.
        q, k, v = keepable((rotate(q, angles), rotate(k, angles), v), "qkv")

        # The products of attention: over the row's own keys, or over the cache, which these keys join first.
        if cache is None:
            if key_places is not None:
                k, v = take_places(k, key_places, self.compute), take_places(v, key_places, self.compute)
            attention = self.compute.attention
            out = flash_attention(
                q, k, v, segments=segments, plan=plan, causal=True, scale=self.scale, implementation=attention
            )
        else:
            assert positions is not None
            out, cache = attend_with_cache(q, k, v, positions, cache, segments, plan, self.compute, self.scale)

        if self.layout == "decode":
            # Flat again: the decode layout's output matrix has heads and their width as one dim.
            heads = self.compute.spec("batch", "length", "act_heads")
            out = jnp.reshape(out, (*x.shape[:2], -1), out_sharding=heads)
            return self.o_proj(out), cache
        return self.o_proj(out, dither=dither and dither.of(3)), cache


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy, layout: Layout = "training"):
        keys = jax.random.split(key, 3)
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.compute = compute
        self.gate_proj: Any
        self.up_proj: Any
        self.down_proj: Any
        if layout == "decode":
            # (out, in), the contracted dim last: a CPU's product reads such a matrix without a copy.
            self.gate_proj = MatrixLinear(keys[0], (f, d), ("mlp", "embed"), out=HIDDEN, compute=compute)
            self.up_proj = MatrixLinear(keys[1], (f, d), ("mlp", "embed"), out=HIDDEN, compute=compute)
            self.down_proj = MatrixLinear(keys[2], (d, f), ("embed", "mlp"), out=STREAM, compute=compute)
            return
        linear = partial(Linear, compute=compute, int8=compute.int8)
        self.gate_proj = linear(keys[0], "btd,df->btf", (d, f), ("embed", "mlp"), out=HIDDEN)
        self.up_proj = linear(keys[1], "btd,df->btf", (d, f), ("embed", "mlp"), out=HIDDEN)
        self.down_proj = linear(keys[2], "btf,fd->btd", (f, d), ("mlp", "embed"), out=STREAM)

    def __call__(self, x: Float[Array, "b t d"], dither: Dither | None = None) -> Float[Array, "b t d"]:
        # Gathered once for all pieces; their gradients are summed in the weights' fp32 sinks.
        gate, up, down = (linear.gathered() for linear in (self.gate_proj, self.up_proj, self.down_proj))

        policy = self.compute.remat
        if dither is None:
            # Also the decode layout's, whose matrices take none.
            def of_piece(piece):
                gated, value = keepable((self.gate_proj(piece, gate), self.up_proj(piece, up)), "mlp_gate_up")
                return self.down_proj(jax.nn.silu(gated) * value, down)

            return map_chunks(of_piece, x, self.compute.mlp_chunk, self.compute.rules, policy=policy)

        def of_dithered(piece, positions):
            into, beside, back = (dither._replace(positions=positions).of(i) for i in (4, 5, 6))
            made = self.gate_proj(piece, gate, into), self.up_proj(piece, up, beside)
            gated, value = keepable(made, "mlp_gate_up")
            return self.down_proj(jax.nn.silu(gated) * value, down, back)

        chunk, rules = self.compute.mlp_chunk, self.compute.rules
        return map_chunks(of_dithered, x, chunk, rules, dither.positions, policy=policy)


class DecoderLayer(nnx.Module):
    """RMSNorm -> attention -> residual -> RMSNorm -> SwiGLU -> residual."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy, layout: Layout = "training"):
        keys = jax.random.split(key)
        self.attention_norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.attention = Attention(keys[0], cfg, compute, layout)
        self.mlp_norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.mlp = SwiGLU(keys[1], cfg, compute, layout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t half"],
        segments: Segments | None,
        plan: BlockPlan | None,
        positions: Int32[Array, "b t"] | None = None,
        cache: LayerCache | None = None,
        key_places: Int32[Array, "b s"] | None = None,
        dither: Dither | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Computes the stream after this layer, and the cache with its items; arguments as `Attention`'s."""
        with jax.named_scope("attention"):
            normed = self.attention_norm(x)
            mixed, cache = self.attention(normed, angles, segments, plan, positions, cache, key_places, dither)
            x = keepable(x + mixed, "mlp_in")
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x), dither), cache


class LanguageModel(nnx.Module):
    """Token embedding, decoder layers, final norm, untied head.

    In the training layout the layers are stacked, to be scanned; in that of decoding they are a list.
    """

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy, layout: Layout = "training"):
        keys = jax.random.split(key, 3)
        # The table is looked up by row, so its rows stay whole on each device; the head's are split over `tensor`.
        self.embedding = normal(keys[0], (cfg.vocab_size, cfg.hidden_size), ("codes", "embed"))
        self.layers: Any  # stacked for a scan, or a list
        if layout == "decode":
            layer_keys = jax.random.split(keys[1], cfg.num_layers)
            self.layers = nnx.List([DecoderLayer(layer_key, cfg, compute, layout) for layer_key in layer_keys])
        else:
            self.layers = stack(lambda k: DecoderLayer(k, cfg, compute), keys[1], cfg.num_layers)
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.head = normal(keys[2], (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        # Set for a training step in which only these rows of the two tables train.
        self.special_rows: SpecialRows | None = None
        # Set for a training step with int8 products: what their gradients are rounded with.
        self.dither_key: PRNGKeyArray | None = None
        self.cfg, self.compute, self.layout = cfg, compute, layout

    def to_decode_layout(self, dtype: DTypeLike | None = None) -> "LanguageModel":
        """Makes the same model with its weights as decoding reads them (`DECODE_LAYOUT`).

        Costs the language model's size in `dtype` (default: the compute dtype) once more; where they need no change
        (same dtype, nothing split over `fsdp`, no NormHead), embedding and head are shared. Drop this model after it
        where nothing else needs it. Rows are not split over `context` by what it computes.
        """
        rules = replace(self.compute.rules, length=None)
        compute = replace(self.compute, dtype=jnp.dtype(dtype or self.compute.dtype), rules=rules)
        normed = self.cfg.use_norm_head
        # Embedding and head serve as they lie; NormHead's division is done once, here.
        values = {
            "embedding": whole(self.embedding, compute),
            "head": self.head_weight(dtype=compute.dtype).value if normed else whole(self.head, compute),
            "norm.scale": self.norm.scale[...],
        }
        # Layer by layer: one layer at a time is whole on a device in both layouts.
        for i in range(self.cfg.num_layers):
            made = decode_layer_values(self.layers, jnp.int32(i), self.cfg, compute)
            values |= {f"layers.{i}.{name}": value for name, value in made.items()}
        # The key draws nothing: the constructor is traced for names and shapes, which are then filled in.
        key = jax.random.key(0)
        return with_values(jax.eval_shape(lambda: LanguageModel(key, self.cfg, compute, "decode")), values)

    def embed(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token embeddings in the compute dtype."""
        spec = self.compute.spec(*STREAM)
        with jax.named_scope("token_embedding"):
            if self.layout == "decode":
                # The table is whole already. Read as bits, or a CPU would cast all of it for each token.
                tokens, table = split_as(tokens, self.compute, "batch"), as_bits(self.embedding[...])
                return from_bits(table.at[tokens].get(out_sharding=spec), self.compute.dtype)
            x = look_up(gather_weight(self.embedding, self.compute), tokens, out=spec)
            return x if self.special_rows is None else self.special_rows.substitute(x, tokens, self.compute)

    @overload
    def __call__(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], segment_ids: Int32[Array, "b t"]
    ) -> Float[Array, "b t d"]: ...

    @overload
    def __call__(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], *, keys: RowKeys
    ) -> Float[Array, "b t d"]: ...

    @overload
    def __call__(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], *, cache: KVCache
    ) -> tuple[Float[Array, "b t d"], KVCache]: ...

    def __call__(self, x, positions, segment_ids=None, *, cache=None, keys=None):
        """Computes hidden states after the final norm: of whole packed rows, or of the next items of cached ones.

        Whole rows: a token sees earlier positions of its own segment; id 0 is padding. A left-padded batch is the same
        call: segment_ids = attention_mask, positions = its cumulative sum.

        With a cache an item sees its row's entries up to its own position. Position -1 is padding: nothing is written,
        its output is zero. A row's positions must differ, and go on where its entries end (or begin again at 0: the row
        is a new one). Nothing is written at positions past the cache's length: the caller ends such rows before. Rows
        of 3, 1 and 0 items in a prefill of t = 4, then a step (t = 1) of all rows but the last:

            positions   0  1  2 -1      3
                        0 -1 -1 -1      1
                       -1 -1 -1 -1     -1

        Args:
            x: embeddings (b, t, d) of the items.
            positions: where each stands in its document (b, t); they restart in a packed row.
            segment_ids: the document of each (b, t); needed without a cache and `keys`.
            cache: what the rows hold; its batch is b.
            keys: what the items of whole rows see instead, in place of `segment_ids`.

        Returns:
            The hidden states (b, t, d), and with a cache also the cache with the items in it.
        """
        if cache is not None:
            return self._with_cache(x, positions, cache)
        # What sees what, and where: once for all layers, since every layer attends alike.
        if keys is None:
            assert segment_ids is not None
            segments, places = Segments.from_row(segment_ids, positions), None
        else:
            segments, places = keys.segments, keys.places
        segments = whole_keys(segments)
        sides = self.compute.attention_q_block, self.compute.attention_kv_block
        block_q, block_kv = (side or self.compute.attention_block for side in sides)
        plan = plan_blocks(segments, causal=True, block_q=block_q, block_kv=block_kv)
        angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta)
        # Layers: one traced body that is scanned, or a list whose weights no scan has to cut out.
        dither, keys = None, None
        if self.dither_key is not None:
            dither = Dither.draw(self.dither_key, x.shape[0], x.shape[1], self.compute)
            keys = jax.random.split(dither.key, self.cfg.num_layers)

        def of_layer(x, layer, key=None):
            mine = None if dither is None else dither._replace(key=key)
            return layer(x, angles, segments, plan, key_places=places, dither=mine)[0]

        layer_of = remat(of_layer, self.compute.remat)
        if self.layout == "decode":
            for layer in self.layers:
                x = layer_of(x, layer)
        else:
            x, _ = jax.lax.scan(lambda x, each: (layer_of(x, each[0], each[1]), None), x, (self.layers, keys))
        return self.norm(x)

    def _with_cache(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], cache: KVCache
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        # Padding keeps its -1 for what is written and seen; its angles only have to be finite.
        x, positions = split_as(x, self.compute, "batch", "length"), split_as(positions, self.compute, "batch")
        at = jnp.maximum(split_as(positions, self.compute, "batch", "length"), 0)
        angles = rope_angles(at, self.cfg.head_dim, self.cfg.rope_theta)
        # One item a row needs no plan: it sees a prefix of the entries, a product that no block of can be left out.
        segments, plan = visible_entries(positions, cache.length, self.compute) if x.shape[1] > 1 else (None, None)
        # Layer by layer, not scanned: each layer's cache is an array of its own, written in place when donated.
        entries = []
        for i, layer_cache in enumerate(cache.layers):
            layer = self.layers[i] if self.layout == "decode" else jax.tree.map(lambda x, i=i: x[i], self.layers)
            x, layer_cache = layer(x, angles, segments, plan, positions, layer_cache)
            entries.append(layer_cache)
        # Padding sees nothing, and kernels differ in what they give for that: it is zero by definition.
        x = jnp.where(positions[..., None] < 0, 0, split_as(self.norm(x), self.compute, "batch"))
        return x, KVCache(tuple(entries))

    def head_weight(
        self,
        rows: Float[Array, "v d"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        axes: tuple[str, ...] = ("vocab", "embed"),
    ) -> Gathered:
        """`rows` (v, d) of the output head as stored (default: all), in `dtype` (default: the compute dtype).

        L2-normalized where the config asks for NormHead. `axes` are the rows' logical axes.
        """
        rows = self.head[...] if rows is None else rows
        compute = self.compute if dtype is None else replace(self.compute, dtype=jnp.dtype(dtype))
        if not self.cfg.use_norm_head:
            return gather_rows(rows, axes, compute)
        # NormHead: normalized in the stored fp32 and narrowed after; the gradient goes through the norm.
        weight = gather(rows, axes, compute)
        norm = jnp.sqrt(jnp.sum(weight * weight, -1, keepdims=True))
        return narrow(weight / jnp.maximum(norm, 1e-12), compute.dtype)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """fp32 logits of every position: for generation and tests; training uses the chunked loss."""
        if self.layout == "decode":
            hidden = split_as(hidden.astype(self.compute.dtype), self.compute, "batch")
            spec = self.compute.spec("batch", *[None] * (hidden.ndim - 2), "act_vocab")
            # Straight to fp32: logits that were rounded to bf16 would tie where sampling has to choose.
            return project(hidden, self.head[...], spec, jnp.float32)
        # Unlike the loss's chunks, rounded to the compute dtype on the way to fp32: for comparison, not for sampling.
        spec = self.compute.spec("batch", "length", "act_vocab")
        return product("btd,vd->btv", hidden.astype(self.compute.dtype), self.head_weight(), out=spec).astype(
            jnp.float32
        )


def take_places(
    x: Float[Array, "b t k h"], places: Int32[Array, "b s"], compute: ComputePolicy
) -> Float[Array, "b s k h"]:
    """Takes each row's tokens at `places`, where the rows lie: they must not be split over `context`."""
    row, heads = compute.spec("batch", "length"), compute.spec(*KV_HEADS)
    take = jax.vmap(lambda row, places: row.at[places].get(mode="clip"))
    return jax.shard_map(take, in_specs=(heads, row), out_specs=heads)(x, places)
