"""The language model (`model.*`, `lm_head.weight`): a Qwen2.5 shaped decoder over packed rows.

Differs from the released model in form only: heads are an axis of their own, the packed `W_pack` is three projections,
layers are stacked and scanned, and documents of a packed row do not see each other. Media tokens take plain positions.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks, whole_keys
from baichuan_omni_jax.llm.special_rows import SpecialRows
from baichuan_omni_jax.nn.layers import RMSNorm, rope_angles, rotate
from baichuan_omni_jax.nn.linear import Gathered, Linear, gather_rows, gather_weight, look_up, narrow, product
from baichuan_omni_jax.nn.param import ComputePolicy, gather, normal, stack
from baichuan_omni_jax.nn.remat import map_chunks, remat

STREAM = ("batch", "length", "act_embed")
HEADS = ("batch", "length", "act_heads", None)
KV_HEADS = ("batch", "length", "act_kv_heads", None)
HIDDEN = ("batch", "length", "act_mlp")


class Attention(nnx.Module):
    """Grouped-query attention with biased Q, K, V and no output bias."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 4)
        d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        in_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        into = "btd,dnh->btnh"
        self.q_proj = Linear(keys[0], into, (d, n, h), in_axes, out=HEADS, compute=compute, bias=True)
        self.k_proj = Linear(keys[1], into, (d, k, h), kv_axes, out=KV_HEADS, compute=compute, bias=True)
        self.v_proj = Linear(keys[2], into, (d, k, h), kv_axes, out=KV_HEADS, compute=compute, bias=True)
        out_axes = ("heads", "head_dim", "embed")
        self.o_proj = Linear(keys[3], "btnh,nhd->btd", (n, h, d), out_axes, out=STREAM, compute=compute)
        self.compute, self.scale = compute, h**-0.5

    def __call__(self, x: Float[Array, "b t d"], angles: Array, segments: Segments, plan: BlockPlan) -> Array:
        q, k, v = rotate(self.q_proj(x), angles), rotate(self.k_proj(x), angles), self.v_proj(x)
        out = flash_attention(
            q,
            k,
            v,
            segments=segments,
            plan=plan,
            causal=True,
            scale=self.scale,
            implementation=self.compute.attention,
        )
        return self.o_proj(out)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear(keys[0], "btd,df->btf", (d, f), ("embed", "mlp"), out=HIDDEN, compute=compute)
        self.up_proj = Linear(keys[1], "btd,df->btf", (d, f), ("embed", "mlp"), out=HIDDEN, compute=compute)
        self.down_proj = Linear(keys[2], "btf,fd->btd", (f, d), ("mlp", "embed"), out=STREAM, compute=compute)
        self.compute = compute

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        # Gathered once for all pieces; their gradients are summed in the weights' fp32 sinks.
        gate, up, down = (linear.gathered() for linear in (self.gate_proj, self.up_proj, self.down_proj))

        def of_piece(piece):
            return self.down_proj(jax.nn.silu(self.gate_proj(piece, gate)) * self.up_proj(piece, up), down)

        return map_chunks(of_piece, x, self.compute.mlp_chunk, self.compute.rules)


class DecoderLayer(nnx.Module):
    """RMSNorm -> attention -> residual -> RMSNorm -> SwiGLU -> residual."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy):
        keys = jax.random.split(key)
        self.attention_norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.attention = Attention(keys[0], cfg, compute)
        self.mlp_norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.mlp = SwiGLU(keys[1], cfg, compute)

    def __call__(self, x: Float[Array, "b t d"], angles: Array, segments: Segments, plan: BlockPlan) -> Array:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), angles, segments, plan)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nnx.Module):
    """Token embedding, stacked decoder layers, final norm, untied head."""

    def __init__(self, key: PRNGKeyArray, cfg: LLMConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        # The table is looked up by row, so its rows stay whole on each device; the head's are split over `tensor`.
        self.embedding = normal(keys[0], (cfg.vocab_size, cfg.hidden_size), ("codes", "embed"))
        self.layers = stack(lambda k: DecoderLayer(k, cfg, compute), keys[1], cfg.num_layers)
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, compute=compute)
        self.head = normal(keys[2], (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        # Set for a training step in which only these rows of the two tables train.
        self.special_rows: SpecialRows | None = None
        self.cfg, self.compute = cfg, compute

    def embed(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token embeddings in the compute dtype."""
        with jax.named_scope("token_embedding"):
            x = look_up(gather_weight(self.embedding, self.compute), tokens, out=self.compute.rules.spec(*STREAM))
            return x if self.special_rows is None else self.special_rows.substitute(x, tokens, self.compute)

    def __call__(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], segment_ids: Int32[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """Hidden states after the final norm. A token sees earlier positions of its own segment; id 0 is padding.

        A left-padded batch is the same call: segment_ids = attention_mask, positions = its cumulative sum.
        """
        segments = whole_keys(Segments.from_row(segment_ids, positions))
        block = self.compute.attention_block
        plan = plan_blocks(segments, causal=True, block_q=block, block_kv=block)
        angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta)

        def body(x, layer):
            return remat(lambda x, layer: layer(x, angles, segments, plan), self.compute.remat)(x, layer), None

        x, _ = jax.lax.scan(body, x, self.layers)
        return self.norm(x)

    def head_weight(
        self,
        rows: Float[Array, "v d"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        axes: tuple[str, ...] = ("vocab", "embed"),
    ) -> Gathered:
        """`rows` (v, d) of the output head as stored (default: all), in `dtype` (default: the compute dtype).

        L2-normalised where the config asks for NormHead. `axes` are the rows' logical axes.
        """
        rows = self.head[...] if rows is None else rows
        compute = self.compute if dtype is None else replace(self.compute, dtype=jnp.dtype(dtype))
        if not self.cfg.use_norm_head:
            return gather_rows(rows, axes, compute)
        weight = gather(rows, axes, compute)
        norm = jnp.sqrt(jnp.sum(weight * weight, -1, keepdims=True))
        return narrow(weight / jnp.maximum(norm, 1e-12), compute.dtype)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """fp32 logits of every position: for generation and tests; training uses the chunked loss."""
        spec = self.compute.rules.spec("batch", "length", "act_vocab")
        return product("btd,vd->btv", hidden.astype(self.compute.dtype), self.head_weight(), out=spec).astype(
            jnp.float32
        )
