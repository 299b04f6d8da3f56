"""The branch `audio_head`: embeddings of audio codes, and the depth transformer that predicts a frame's codes.

`model.audio_embed_layers.*` and `audio_head.*` of the checkpoint. At a position whose next item is an audio frame with
codes c0 .. c7, the hidden state x starts a sequence over depth, of which position q predicts level q:

    [x, e0(c0), e0(c0) + e1(c1), .., e0(c0) + .. + e6(c6)]  ->  logits of c0, c1, .., c7

Rows are split over (data, fsdp), positions over (context, tensor); weights are whole while they are computed with.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import AudioHeadConfig
from baichuan_omni_jax.nn.layers import RMSNorm, gelu
from baichuan_omni_jax.nn.linear import Linear, gather_weight, look_up, product
from baichuan_omni_jax.nn.param import Buffer, ComputePolicy, normal, split_as, stack, use
from baichuan_omni_jax.nn.remat import remat

STREAM = ("batch", "media", None)
DEPTH = ("batch", "media", None, None)
HEADS = ("batch", "media", None, None, None)


class AudioEmbedding(nnx.Module):
    """One table a level, (size_q + 1, d): the last row is the end of speech, which only level 0 uses."""

    def __init__(self, key: PRNGKeyArray, codebook_sizes: tuple[int, ...], width: int, compute: ComputePolicy):
        keys = jax.random.split(key, len(codebook_sizes))
        self.tables = nnx.List(
            [normal(keys[q], (size + 1, width), ("codes", "embed")) for q, size in enumerate(codebook_sizes)]
        )
        self.compute = compute

    def levels(self, codes: Int32[Array, "b a q"], count: int | None = None) -> list[Float[Array, "b a d"]]:
        """The embedding of each of the first `count` levels (default: all), in the compute dtype."""
        codes, spec = split_as(codes, self.compute, *STREAM), self.compute.rules.spec(*STREAM)
        return [
            look_up(gather_weight(table, self.compute), codes[..., q], out=spec)
            for q, table in enumerate(self.tables[:count])
        ]

    def __call__(self, codes: Int32[Array, "b a q"]) -> Float[Array, "b a d"]:
        """Sum over levels q of table q at its code: what an audio position feeds the language model."""
        if codes.shape[-1] != len(self.tables):
            raise ValueError(f"codes {codes.shape} do not hold {len(self.tables)} levels")
        with jax.named_scope("audio_embedding"):
            return sum(self.levels(codes))


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

    def __call__(self, x: Float[Array, "b c q d"]) -> Float[Array, "b c q d"]:
        # Eight positions: the whole score matrix is smaller than a block of the attention kernel.
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scores = jnp.einsum("bcqnh,bcsnh->bcnqs", q, k, preferred_element_type=jnp.float32) * self.scale
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1).astype(v.dtype)
        return self.o_proj(jnp.einsum("bcnqs,bcsnh->bcqnh", weights, v))


class DepthLayer(nnx.Module):
    """RMSNorm -> attention -> residual -> RMSNorm -> an MLP of its own for each depth, added to the normalised stream.

    The released code never adds the MLP's biases; they are carried for the checkpoint's sake.
    """

    def __init__(self, key: PRNGKeyArray, width: int, depth: int, cfg: AudioHeadConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        d, f = width, 2 * width
        self.attention_norm = RMSNorm(d, eps=cfg.norm_eps, compute=compute)
        self.attention = DepthAttention(keys[0], d, cfg.head_dim, compute)
        self.mlp_norm = RMSNorm(d, eps=cfg.norm_eps, compute=compute)
        axes1, axes2 = ("small", "depth", "embed"), ("embed", "depth", "small")
        self.linear1 = Linear(keys[1], "bcqd,fqd->bcqf", (f, depth, d), axes1, out=DEPTH, compute=compute)
        self.linear2 = Linear(keys[2], "bcqf,dqf->bcqd", (d, depth, f), axes2, out=DEPTH, compute=compute)
        self.unused_bias1 = Buffer(jnp.zeros((f,), jnp.float32), axes=("small",))
        self.unused_bias2 = Buffer(jnp.zeros((d,), jnp.float32), axes=("norm",))

    def __call__(self, x: Float[Array, "b c q d"]) -> Float[Array, "b c q d"]:
        with jax.named_scope("attention"):
            x = self.mlp_norm(x + self.attention(self.attention_norm(x)))
        with jax.named_scope("mlp"):
            return x + self.linear2(gelu(self.linear1(x)))


class AudioHead(nnx.Module):
    """Depth layers, RMSNorm, and a biased linear head a level, (d, size_q + 1)."""

    def __init__(
        self,
        key: PRNGKeyArray,
        cfg: AudioHeadConfig,
        codebook_sizes: tuple[int, ...],
        width: int,
        compute: ComputePolicy,
    ):
        keys = jax.random.split(key, 1 + len(codebook_sizes))
        depth = len(codebook_sizes)
        self.layers = stack(lambda k: DepthLayer(k, width, depth, cfg, compute), keys[0], cfg.num_layers)
        self.norm = RMSNorm(width, eps=cfg.norm_eps, compute=compute)
        self.heads = nnx.List(
            [
                Linear(
                    head_key,
                    "bcd,dv->bcv",
                    (width, size + 1),
                    ("embed", "codes"),
                    out=STREAM,
                    compute=compute,
                    bias=True,
                )
                for head_key, size in zip(keys[1:], codebook_sizes, strict=True)
            ]
        )
        self.compute = compute

    def __call__(self, x: Float[Array, "b c q d"]) -> tuple[Float[Array, "b c _"], ...]:
        """Logits of each level, fp32, from the depth sequence (the hidden state, then cumulated code embeddings)."""
        with jax.named_scope("depth_transformer"):
            x, _ = jax.lax.scan(
                lambda x, layer: (remat(lambda x, layer: layer(x), self.compute.remat)(x, layer), None), x, self.layers
            )
            x = self.norm(x)
        with jax.named_scope("audio_logits"):
            return tuple(self._logits(head, x[:, :, q]) for q, head in enumerate(self.heads))

    def _logits(self, head: Linear, x: Float[Array, "b c d"]) -> Float[Array, "b c v"]:
        # Not `head(x)`: a loss wants logits that were never rounded to the compute dtype.
        y = product(head.equation, x, head.gathered(), out=self.compute.rules.spec(*STREAM), dtype=jnp.float32)
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
    ):
        keys = jax.random.split(key)
        self.embedding = AudioEmbedding(keys[0], codebook_sizes, width, compute)
        self.head = AudioHead(keys[1], cfg, codebook_sizes, width, compute)
        self.compute = compute

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
        total, sequence = 0.0, [split_as(hidden, self.compute, *STREAM).astype(self.compute.dtype)]
        for embedded in self.embedding.levels(codes, levels - 1):
            total = total + embedded.astype(jnp.float32)
            sequence.append(total.astype(self.compute.dtype))
        return self.head(jnp.stack(sequence, 2))
