"""The pre-norm transformer layer of vision tower, audio encoder and decoder, and flow matching; the scan over a stack.

Weights are whole on every device while they are computed with, so rows may be split in any way that keeps a segment
(a frame, a clip) on one device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks
from baichuan_omni_jax.nn.layers import LayerNorm, RMSNorm, gelu, rotate
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.nn.remat import keepable, remat


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Says which layer a stack is made of.

    Attributes:
        width: of the stream.
        heads: of attention, `head_width` wide each (None: width / heads).
        ffn: width inside the feed-forward.
        eps: of the norms.
        rows: logical axes of the activations' first two dims.
        activation: of the feed-forward.
        key_bias: whether the projection to keys has a bias; Whisper's has none.
        query_value_bias: whether those to queries and values have one.
        causal: whether a token sees no later position.
        norm: the class of the norms.
    """

    width: int
    heads: int
    ffn: int
    eps: float
    rows: tuple[str | None, str | None]
    activation: Callable[[Array], Array] = gelu
    key_bias: bool = True
    query_value_bias: bool = True
    causal: bool = False
    head_width: int | None = None
    norm: type[LayerNorm] | type[RMSNorm] = LayerNorm

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_width or self.width // self.heads


class EncoderAttention(nnx.Module):
    """Attends within segments: biases of Q, K, V by choice, rotary where angles are given."""

    def __init__(self, key: PRNGKeyArray, sizes: EncoderSizes, compute: ComputePolicy):
        keys = jax.random.split(key, 4)
        d, n, h = sizes.width, sizes.heads, sizes.head_dim

        # The checkpoints' fused or flat projections, with the heads as an axis of their own.
        def into(key: PRNGKeyArray, bias: bool) -> Linear:
            axes, out = ("embed", "small", "small"), (*sizes.rows, None, None)
            return Linear(key, "btd,dnh->btnh", (d, n, h), axes, out=out, compute=compute, bias=bias)

        self.q_proj, self.v_proj = into(keys[0], sizes.query_value_bias), into(keys[2], sizes.query_value_bias)
        self.k_proj = into(keys[1], sizes.key_bias)
        axes, out = ("small", "small", "embed"), (*sizes.rows, None)
        self.o_proj = Linear(keys[3], "btnh,nhd->btd", (n, h, d), axes, out=out, compute=compute, bias=True)
        self.sizes, self.compute = sizes, compute

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, plan: BlockPlan, angles: Array | None
    ) -> Float[Array, "b t d"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # Only the vision tower has rotary positions; audio adds sinusoids, flow matching has none.
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = keepable((q, k, v), "qkv")
        # No segment straddles devices here: keys and values need not be gathered.
        out = flash_attention(
            q,
            k,
            v,
            segments=segments,
            plan=plan,
            causal=self.sizes.causal,
            scale=self.sizes.head_dim**-0.5,
            implementation=self.compute.attention,
            gather_kv=False,
        )
        return self.o_proj(out)


class FeedForward(nnx.Module):
    """Computes fc2(activation(fc1(x))), both biased."""

    def __init__(self, key: PRNGKeyArray, sizes: EncoderSizes, compute: ComputePolicy):
        keys = jax.random.split(key)
        d, f, out = sizes.width, sizes.ffn, (*sizes.rows, None)
        self.fc1 = Linear(keys[0], "btd,df->btf", (d, f), ("embed", "small"), out=out, compute=compute, bias=True)
        self.fc2 = Linear(keys[1], "btf,fd->btd", (f, d), ("small", "embed"), out=out, compute=compute, bias=True)
        self.activation = sizes.activation

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.fc2(self.activation(keepable(self.fc1(x), "mlp_gate_up")))


class EncoderLayer(nnx.Module):
    """Computes norm -> attention -> residual -> norm -> feed-forward -> residual."""

    def __init__(self, key: PRNGKeyArray, sizes: EncoderSizes, compute: ComputePolicy):
        keys = jax.random.split(key)
        self.attention_norm = sizes.norm(sizes.width, eps=sizes.eps, compute=compute)
        self.attention = EncoderAttention(keys[0], sizes, compute)
        self.mlp_norm = sizes.norm(sizes.width, eps=sizes.eps, compute=compute)
        self.mlp = FeedForward(keys[1], sizes, compute)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, plan: BlockPlan, angles: Array | None
    ) -> Float[Array, "b t d"]:
        with jax.named_scope("attention"):
            x = keepable(x + self.attention(self.attention_norm(x), segments, plan, angles), "mlp_in")
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


def run_encoder(
    layers: EncoderLayer,
    x: Float[Array, "b t d"],
    segment_ids: Int32[Array, "b t"],
    positions: Int32[Array, "b t"],
    *,
    sizes: EncoderSizes,
    compute: ComputePolicy,
    angles: Float[Array, "b t half"] | None = None,
) -> Float[Array, "b t d"]:
    """Runs `x` through a stack of layers.

    Args:
        layers: `stack` of `EncoderLayer`, each parameter with a `layers` axis in front.
        x: the stream (b, t, d).
        segment_ids: tokens see their own segment alone; 0 is padding. No segment may straddle devices.
        positions: for a causal stack: earlier ones are seen. Equal positions see each other.
        sizes: what the layers were built with.
        compute: dtype, remat policy, attention's implementation and block.
        angles: rotary angles (b, t, head dim / 2); None: no rotary positions.

    Returns:
        The stream after the last layer, in the compute dtype.
    """
    # One plan for all layers: they share segments, and planning inside the scan would repeat it.
    segments = Segments.from_row(segment_ids, positions)
    block = compute.attention_block
    plan = plan_blocks(segments, causal=sizes.causal, block_q=block, block_kv=block, gather_kv=False)

    # One layer's weights are gathered at a time, and recomputed as the policy says.
    def body(x: Array, layer: EncoderLayer) -> tuple[Array, None]:
        return remat(lambda x, layer: layer(x, segments, plan, angles), compute.remat)(x, layer), None

    # Cast before the scan, whose carry keeps one type; its body is compiled once, whatever the depth.
    x, _ = jax.lax.scan(body, x.astype(compute.dtype), layers)
    return x
