"""The branch `audio_head`: embeddings of audio codes, and the depth transformer that predicts a frame's codes.

`model.audio_embed_layers.*` and `audio_head.*` of the checkpoint. At a position whose next item is an audio frame with
codes c0 .. c7, the hidden state x starts a sequence over depth, of which position q predicts level q:

    [x, e0(c0), e0(c0) + e1(c1), .., e0(c0) + .. + e6(c6)]  ->  logits of c0, c1, .., c7

Rows are split over (data, fsdp), positions over (context, tensor); weights are whole while they are computed with.

The same modules train and decode: with a cache over depth a frame is made level by level, nothing of a level computed
twice. Decoding reads weights in a layout of its own (`stored_part` is the table): layers apart, and of an MLP each
level's matrices side by side, as no program should cut them out of the whole for every frame. That both compute the
same is shown by `test_the_depth_cache_gives_the_logits_of_the_whole_depth_sequence` in `tests/llm/test_audio_head.py`.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import AudioHeadConfig
from baichuan_omni_jax.nn.layers import RMSNorm, gelu
from baichuan_omni_jax.nn.linear import Linear, gather_weight, look_up, product
from baichuan_omni_jax.nn.param import (
    Buffer,
    ComputePolicy,
    named_variables,
    normal,
    split_as,
    stack,
    use,
    with_values,
)
from baichuan_omni_jax.nn.remat import remat
from baichuan_omni_jax.sharding import ShardingRules

STREAM = ("batch", "media", None)
DEPTH = ("batch", "media", None, None)
HEADS = ("batch", "media", None, None, None)

Layout = Literal["training", "decode"]
# Keys and values (b, c, levels, n, h) of one layer.
DepthCache = tuple[Float[Array, "b c s n h"], Float[Array, "b c s n h"]]
# Takes a level and its logits (b, w), gives each row's code of it.
Choose = Callable[[Int32[Array, ""], Float[Array, "b w"]], Int32[Array, " b"]]


class AudioEmbedding(nnx.Module):
    """One table a level, (size_q + 1, d): the last row is the end of speech, which only level 0 uses."""

    def __init__(self, key: PRNGKeyArray, codebook_sizes: tuple[int, ...], width: int, compute: ComputePolicy):
        keys = jax.random.split(key, len(codebook_sizes))
        self.tables = nnx.List(
            [normal(keys[q], (size + 1, width), ("codes", "embed")) for q, size in enumerate(codebook_sizes)]
        )
        self.compute = compute

    def level(self, q: int, codes: Int32[Array, "b a"]) -> Float[Array, "b a d"]:
        """The embeddings of codes of one level, in the compute dtype."""
        return look_up(gather_weight(self.tables[q], self.compute), codes, out=self.compute.spec(*STREAM))

    def levels(self, codes: Int32[Array, "b a q"], count: int | None = None) -> list[Float[Array, "b a d"]]:
        """The embedding of each of the first `count` levels (default: all), in the compute dtype."""
        codes = split_as(codes, self.compute, *STREAM)
        return [self.level(q, codes[..., q]) for q in range(len(self.tables))[:count]]

    def __call__(self, codes: Int32[Array, "b a q"]) -> Float[Array, "b a d"]:
        """Sum over levels q of table q at its code: what an audio position feeds the language model."""
        if codes.shape[-1] != len(self.tables):
            raise ValueError(f"codes {codes.shape} do not hold {len(self.tables)} levels")
        with jax.named_scope("audio_embedding"):
            # Table by table: codebooks differ in size, so the levels are no single array to look up in.
            first, *rest = self.levels(codes)
            return sum(rest, first)


class DepthAttention(nnx.Module):
    """Causal attention over the depth positions of one frame; all projections biased."""

    def __init__(self, key: PRNGKeyArray, width: int, head_dim: int, compute: ComputePolicy):
        keys = jax.random.split(key, 4)
        shape, axes, into = (width, width // head_dim, head_dim), ("embed", "small", "small"), "bcqd,dnh->bcqnh"
        self.q_proj = Linear(keys[0], into, shape, axes, out=HEADS, compute=compute, bias=True)
        self.k_proj = Linear(keys[1], into, shape, axes, out=HEADS, compute=compute, bias=True)
        self.v_proj = Linear(keys[2], into, shape, axes, out=HEADS, compute=compute, bias=True)
        back, back_axes = (*shape[1:], width), ("small", "small", "embed")
        self.o_proj = Linear(keys[3], "bcqnh,nhd->bcqd", back, back_axes, out=DEPTH, compute=compute, bias=True)
        self.scale = head_dim**-0.5

    def __call__(
        self, x: Float[Array, "b c q d"], cache: DepthCache | None = None, level: int = 0
    ) -> tuple[Float[Array, "b c q d"], DepthCache | None]:
        """Attends over all depth positions, or (q = 1) over those of the cache up to `level`, which `x` is.

        Returns the output, and the cache with this level in it (None without one).
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # `level` is static: what lies behind it in the cache is left out, not masked.
        if cache is not None:
            cache = cache[0].at[:, :, level].set(k[:, :, 0]), cache[1].at[:, :, level].set(v[:, :, 0])
            k, v = (entries[:, :, : level + 1] for entries in cache)
        # Eight positions: the whole score matrix is smaller than a block of the attention kernel.
        scores = jnp.einsum("bcqnh,bcsnh->bcnqs", q, k, preferred_element_type=jnp.float32) * self.scale
        # The last query sits on the last key: one query of a cache sees all of them.
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool), k.shape[2] - q.shape[2])
        # Softmax of the fp32 scores; weights are rounded only for their product with the values.
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1).astype(v.dtype)
        return self.o_proj(jnp.einsum("bcnqs,bcsnh->bcqnh", weights, v)), cache


class DepthLayer(nnx.Module):
    """RMSNorm -> attention -> residual -> RMSNorm -> an MLP of its own for each depth, added to the normalized stream.

    The released code never adds the MLP's biases; they are carried for the checkpoint's sake.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        width: int,
        depth: int,
        cfg: AudioHeadConfig,
        compute: ComputePolicy,
        layout: Layout = "training",
    ):
        keys = jax.random.split(key, 3)
        d, f = width, 2 * width
        self.attention_norm = RMSNorm(d, eps=cfg.norm_eps, compute=compute)
        self.attention = DepthAttention(keys[0], d, cfg.head_dim, compute)
        self.mlp_norm = RMSNorm(d, eps=cfg.norm_eps, compute=compute)
        self.layout = layout
        # A linear map of all depths, or a list of one for each.
        self.linear1: Any
        self.linear2: Any
        if layout == "decode":
            up, down = ("bcqd,fd->bcqf", (f, d)), ("bcqf,df->bcqd", (d, f))
            self.linear1, self.linear2 = (
                nnx.List([Linear(k, *form, ("small", "small"), out=DEPTH, compute=compute) for _ in range(depth)])
                for k, form in zip(keys[1:], (up, down), strict=True)
            )
            return
        axes1, axes2 = ("small", "depth", "embed"), ("embed", "depth", "small")
        self.linear1 = Linear(keys[1], "bcqd,fqd->bcqf", (f, depth, d), axes1, out=DEPTH, compute=compute)
        self.linear2 = Linear(keys[2], "bcqf,dqf->bcqd", (d, depth, f), axes2, out=DEPTH, compute=compute)
        self.unused_bias1 = Buffer(jnp.zeros((f,), jnp.float32), axes=("small",), moments=(0.0, 0.0))
        self.unused_bias2 = Buffer(jnp.zeros((d,), jnp.float32), axes=("norm",), moments=(0.0, 0.0))

    def __call__(
        self, x: Float[Array, "b c q d"], cache: DepthCache | None = None, level: int = 0
    ) -> tuple[Float[Array, "b c q d"], DepthCache | None]:
        """Computes the stream after this layer: of all depths, or of `level` alone with a cache."""
        with jax.named_scope("attention"):
            mixed, cache = self.attention(self.attention_norm(x), cache, level)
            # Parity: the released layer adds its MLP to the normalized stream, not to the stream.
            x = self.mlp_norm(x + mixed)
        with jax.named_scope("mlp"):
            # A matrix a level where one level is computed, all levels in one product where the frame is known.
            own = self.layout == "decode"
            first, second = (self.linear1[level], self.linear2[level]) if own else (self.linear1, self.linear2)
            return x + second(gelu(first(x))), cache


class AudioHead(nnx.Module):
    """Depth layers, RMSNorm, and a biased linear head a level, (d, size_q + 1)."""

    def __init__(
        self,
        key: PRNGKeyArray,
        cfg: AudioHeadConfig,
        codebook_sizes: tuple[int, ...],
        width: int,
        compute: ComputePolicy,
        layout: Layout = "training",
    ):
        keys = jax.random.split(key, 1 + len(codebook_sizes))
        depth = len(codebook_sizes)
        self.layers: Any  # stacked for a scan, or a list
        if layout == "decode":
            layer_keys = jax.random.split(keys[0], cfg.num_layers)
            self.layers = nnx.List([DepthLayer(k, width, depth, cfg, compute, layout) for k in layer_keys])
        else:
            self.layers = stack(lambda k: DepthLayer(k, width, depth, cfg, compute), keys[0], cfg.num_layers)
        self.norm = RMSNorm(width, eps=cfg.norm_eps, compute=compute)
        axes = ("embed", "codes")
        self.heads = nnx.List(
            [
                Linear(head_key, "bcd,dv->bcv", (width, size + 1), axes, out=STREAM, compute=compute, bias=True)
                for head_key, size in zip(keys[1:], codebook_sizes, strict=True)
            ]
        )
        self.compute = compute

    def __call__(self, x: Float[Array, "b c q d"]) -> tuple[Float[Array, "b c _"], ...]:
        """Logits of each level, fp32, from the depth sequence (the hidden state, then cumulated code embeddings)."""
        # Layers scanned as the language model's are: one is compiled, and recomputed as the policy says.
        layer_of = remat(lambda x, layer: layer(x)[0], self.compute.remat)
        with jax.named_scope("depth_transformer"):
            x, _ = jax.lax.scan(lambda x, layer: (layer_of(x, layer), None), x, self.layers)
            x = self.norm(x)
        # Position q of the depth sequence predicts level q alone, by a head of its codebook's size.
        with jax.named_scope("audio_logits"):
            return tuple(self._logits(head, x[:, :, q]) for q, head in enumerate(self.heads))

    def at_level(
        self, level: int, x: Float[Array, "b c d"], caches: tuple[DepthCache, ...]
    ) -> tuple[Float[Array, "b c _"], tuple[DepthCache, ...]]:
        """Logits of one level, fp32, and the caches with it, in the decode layout.

        Args:
            level: which; levels below must be in the caches.
            x: the hidden state at level 0, then the sum of the embeddings of the frame's codes so far.
            caches: of each layer.
        """
        x, after = x[:, :, None], []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, level)
            after.append(cache)
        return self._logits(self.heads[level], self.norm(x)[:, :, 0]), tuple(after)

    def _logits(self, head: Linear, x: Float[Array, "b c d"]) -> Float[Array, "b c v"]:
        # Not `head(x)`: a loss wants logits that were never rounded to the compute dtype.
        y = product(
            head.equation,
            x,
            gather_weight(head.weight, head.compute),
            out=self.compute.spec(*STREAM),
            dtype=jnp.float32,
        )
        assert head.bias is not None
        return y + use(head.bias, self.compute, jnp.float32)


class AudioHeadBranch(nnx.Module):
    """The branch `audio_head`: `embedding`, read where audio enters the stream, and `head`, where it leaves."""

    def __init__(
        self,
        key: PRNGKeyArray,
        cfg: AudioHeadConfig,
        codebook_sizes: tuple[int, ...],
        width: int,
        compute: ComputePolicy,
        layout: Layout = "training",
    ):
        keys = jax.random.split(key)
        self.embedding = AudioEmbedding(keys[0], codebook_sizes, width, compute)
        self.head = AudioHead(keys[1], cfg, codebook_sizes, width, compute, layout)
        self.cfg, self.codebook_sizes, self.width, self.compute = cfg, codebook_sizes, width, compute

    @property
    def end_code(self) -> int:
        """The code of level 0 that ends speech."""
        return self.codebook_sizes[0]

    def embed(self, codes: Int32[Array, "b a q"]) -> Float[Array, "b a d"]:
        """Embeddings of audio positions: the sum over levels. Codes of level q lie in 0 .. size_q."""
        return self.embedding(codes)

    def __call__(
        self, hidden: Float[Array, "b c d"], codes: Int32[Array, "b c q"]
    ) -> tuple[Float[Array, "b c _"], ...]:
        """Logits (b, c, size_q + 1), fp32, of each level of the frames that follow `hidden`, given the frames' codes.

        Level q's logits see the codes of levels below q only. Raises ValueError on shapes that do not fit.
        """
        levels = len(self.embedding.tables)
        if codes.shape != (*hidden.shape[:2], levels):
            raise ValueError(
                f"codes {codes.shape} do not fit hidden {hidden.shape}: expected {levels} levels a position"
            )
        # The depth sequence: the hidden state, then running sums of embeddings, in fp32 so that they do not drift.
        total, sequence = 0.0, [split_as(hidden, self.compute, *STREAM).astype(self.compute.dtype)]
        for embedded in self.embedding.levels(codes, levels - 1):
            total = total + embedded.astype(jnp.float32)
            sequence.append(total.astype(self.compute.dtype))
        return self.head(jnp.stack(sequence, 2))

    def to_decode_layout(self, dtype: DTypeLike | None = None) -> "AudioHeadBranch":
        """Makes the same branch with its weights as decoding reads them; call it inside a jitted function.

        Weights come in `dtype` (default: the compute dtype), biases and norm scales as stored, all whole on every
        device. Nothing that it computes carries a sharding, so that it runs inside the caller's `shard_map`.
        """
        dtype = jnp.dtype(dtype or self.compute.dtype)
        compute = replace(self.compute, dtype=dtype, rules=ShardingRules.unsplit())
        sizes, key = (self.cfg, self.codebook_sizes, self.width), jax.random.key(0)
        abstract = jax.eval_shape(lambda: AudioHeadBranch(key, *sizes, compute, "decode"))
        stored, values = named_variables(self), {}
        for name in named_variables(abstract):
            source, part = stored_part(name)
            # Biases and scales are small: they stay as stored, so that decoding rounds them where training does.
            kept = name.endswith(("bias", "scale"))
            values[name] = use(stored[source], self.compute, jnp.float32 if kept else compute.dtype)[part]
        return with_values(abstract, values)

    def empty_caches(self, rows: int) -> tuple[DepthCache, ...]:
        """Makes the caches over depth of one frame of each row, in the decode layout."""
        head_dim = self.cfg.head_dim
        shape = (rows, 1, len(self.codebook_sizes), self.width // head_dim, head_dim)
        zeros = jnp.zeros(shape, self.compute.dtype)
        return ((zeros, zeros),) * self.cfg.num_layers

    def level_logits(
        self, level: int, x: Float[Array, "b d"], caches: tuple[DepthCache, ...]
    ) -> tuple[Float[Array, "b w"], tuple[DepthCache, ...]]:
        """Logits (b, largest size + 1) of one level, and the caches with it; arguments as `AudioHead.at_level`'s.

        What is no code of the level is -inf, of levels above 0 the extra index too: only level 0 can end speech.
        """
        logits, caches = self.head.at_level(level, x[:, None], caches)
        logits = logits[:, 0, : None if level == 0 else -1]
        # Padded to the widest level: the branches of a switch must agree in shape.
        missing = max(self.codebook_sizes) + 1 - logits.shape[1]
        return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf), caches

    def decode_frame(self, hidden: Float[Array, "b d"], choose: Choose) -> Int32[Array, "b q"]:
        """Makes the frames that follow `hidden`, in the decode layout.

        Args:
            hidden: the language model's states, one a row.
            choose: takes each level's codes (b,) in turn, from the level and its logits (see `level_logits`).

        Returns:
            The codes of every level.
        """
        b, levels = len(hidden), len(self.codebook_sizes)

        def one_level(level, carry):
            x, total, caches, codes = carry
            # A branch a level, so that its weights are read where they lie; choosing is compiled once.
            logits, caches = jax.lax.switch(level, [partial(self.level_logits, q) for q in range(levels)], x, caches)
            # The next position's input: the embeddings of the levels so far, summed in fp32 as in training.
            chosen = choose(level, logits)
            embedded = jax.lax.switch(level, [partial(self.embedding.level, q) for q in range(levels)], chosen[:, None])
            total = total + embedded[:, 0].astype(jnp.float32)
            codes = jnp.where(jnp.arange(levels) == level, chosen[:, None], codes)
            return total.astype(self.compute.dtype), total, caches, codes

        # The caches last for one frame, a position a level, so they are made here and never leave the program.
        total, codes = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros((b, levels), jnp.int32)
        carry = hidden.astype(self.compute.dtype), total, self.empty_caches(b), codes
        with jax.named_scope("decode_frame"):
            return jax.lax.fori_loop(0, levels, one_level, carry)[-1]


_LAYER = re.compile(r"head\.layers\.(\d+)\.(?:(linear[12])\.(\d+)\.(weight)|(.+))")


def stored_part(name: str) -> tuple[str, tuple[int | slice, ...]]:
    """Which part of which stored parameter a parameter of the decode layout is: the table of both layouts.

    head.layers.I.linear1.Q.weight (f, d)    head.layers.linear1.weight (layers, f, q, d) [I, :, Q]
    head.layers.I.linear2.Q.weight (d, f)    head.layers.linear2.weight (layers, d, q, f) [I, :, Q]
    head.layers.I.NAME                       head.layers.NAME [I]
    anything else                            itself
    """
    found = _LAYER.fullmatch(name)
    if not found:
        return name, ()
    layer, linear, level, weight, rest = found.groups()
    if rest:
        return f"head.layers.{rest}", (int(layer),)
    return f"head.layers.{linear}.{weight}", (int(layer), slice(None), int(level))
