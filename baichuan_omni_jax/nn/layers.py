"""The parts of layers: norms, rotary positions and activations, in fp32 whatever comes in; the time axis below them.

Along the time axis items of different lengths lie in one array, channels last. A 1-D convolution is one matrix product
over windows; its weight is (kernel, in, out).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.nn.linear import Gathered, Linear, add_bias, gather_weight, product
from baichuan_omni_jax.nn.param import ComputePolicy, normal, ones, use, zeros


class RMSNorm(nnx.Module):
    """Normalizes the last axis by its root mean square: x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with jax.named_scope("rms_norm"):
            wide = x.astype(jnp.float32)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
            return (wide * use(self.scale, self.compute, jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalizes the last axis: (x - mean) / sqrt(var + eps) * scale + bias."""

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.bias = zeros((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with jax.named_scope("layer_norm"):
            wide = x.astype(jnp.float32)
            # Centered before it is squared: mean(x^2) - mean(x)^2 cancels where the mean is large.
            wide = wide - jnp.mean(wide, -1, keepdims=True)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
            wide = wide * use(self.scale, self.compute, jnp.float32) + use(self.bias, self.compute, jnp.float32)
            return wide.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalizes an item: (x - mean) / sqrt(var + eps) * scale + bias, over all channels of its counted frames.

    One group (PyTorch's `GroupNorm(1, width)`). With every frame counted, padding moves the statistics.
    """

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.bias = zeros((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "b t c"], counted: Bool[Array, "b t"]) -> Float[Array, "b t c"]:
        with jax.named_scope("group_norm"):
            # Frames that do not count are normalized too, by the statistics of those that do: the caller drops them.
            wide, counted = x.astype(jnp.float32), counted[..., None]
            values = jnp.maximum(counted.sum((1, 2), keepdims=True) * x.shape[2], 1)
            wide = wide - jnp.where(counted, wide, 0).sum((1, 2), keepdims=True) / values
            variance = jnp.where(counted, wide * wide, 0).sum((1, 2), keepdims=True) / values
            wide = wide * jax.lax.rsqrt(variance + self.eps)
            wide = wide * use(self.scale, self.compute, jnp.float32) + use(self.bias, self.compute, jnp.float32)
            return wide.astype(x.dtype)


def rope_angles(positions: Int32[Array, "b t"], head_dim: int, theta: float) -> Float[Array, "b t half"]:
    """Returns the angle of each position and frequency: position * theta^(-2i / head_dim), i = 0 .. head_dim/2 - 1.

    head_dim 4, theta 100: frequencies 1 and 0.1, so position 3 has angles [3, 0.3].
    """
    # fp32, as positions reach tens of thousands: there bf16 steps by hundreds of radians.
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate(x: Float[Array, "b t n h"], angles: Float[Array, "b t half"]) -> Float[Array, "b t n h"]:
    """Turns (x1, x2), the two halves of h, by each angle: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    # The same angle for all heads; fp32, as bf16 cannot tell late positions apart.
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x * Phi(x) by the error function: the exact form, as released."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x * sigmoid(1.702 x), the approximation that the released vision tower is trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def length_mask(lengths: Int32[Array, " m"], frames: int) -> Bool[Array, "m t"]:
    """Returns True for the first `lengths[i]` frames: lengths [1, 3], 3 frames -> [[1, 0, 0], [1, 1, 1]]."""
    return jnp.arange(frames) < lengths[:, None]


def mask_padding(x: Float[Array, "m t ..."], lengths: Int32[Array, " m"]) -> Float[Array, "m t ..."]:
    """Returns `x`, zero past each item's length."""
    real = length_mask(lengths, x.shape[1])
    # A select, not a product: what is not finite in padding would stay so times 0.
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


def resize_nearest(
    x: Float[Array, "m t c"], lengths: Int32[Array, " m"], new_lengths: Int32[Array, " m"], frames: int
) -> Float[Array, "m s c"]:
    """Stretches each item's first `lengths` frames to `new_lengths`, in an array of `frames` frames.

    Frame i is frame floor(i * (length / new length)) of the input, the ratio rounded to fp32 as PyTorch does; past the
    new length it repeats the last one. 4 frames to 3: frames 0, 1, 2 of [0, 1.33, 2.67].
    """
    # fp32 throughout: at some lengths fp64 would pick another frame than the released computation.
    ratio = lengths.astype(jnp.float32) / jnp.maximum(new_lengths, 1).astype(jnp.float32)
    index = jnp.floor(jnp.arange(frames, dtype=jnp.float32) * ratio[:, None]).astype(jnp.int32)
    # Past the new length, and where rounding points one too far, it is the last frame of the item itself.
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(x, jnp.minimum(index, last[:, None])[..., None], 1)


class Conv1d(nnx.Module):
    """Convolves windows of `kernel` frames every `stride`, `padding` zeros on both sides; the time axis is not split.

    (b, t, in) -> (b, (t + 2 padding - kernel) // stride + 1, out). The checkpoint's weight is (out, in, kernel).
    `causal` puts kernel - 1 zeros on the left only. `channels` are the logical axes of the weight's in and out.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        rows: str | None,
        compute: ComputePolicy,
        bias: bool = True,
        gain: float = 1.0,
        causal: bool = False,
        channels: tuple[str, str] = ("small", "embed"),
    ):
        axes, out = ("kernel", *channels), (rows, None, None)
        self.linear = Linear(key, "btkc,kcd->btd", shape, axes, out=out, compute=compute, bias=bias, gain=gain)
        self.kernel, self.stride = shape[0], stride
        self.padding = (shape[0] - 1, 0) if causal else (padding, padding)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b s d"]:
        # Padding is zeros of the batch's array: what lies past an item's end, the caller has masked.
        x = jnp.pad(x, ((0, 0), self.padding, (0, 0)))
        count = (x.shape[1] - self.kernel) // self.stride + 1
        end = (count - 1) * self.stride + 1
        # One strided slice a tap, then a single product over taps and channels together.
        windows = jnp.stack([x[:, i : i + end : self.stride] for i in range(self.kernel)], 2)
        return self.linear(windows)


class TransposedConv1d(nnx.Module):
    """Adds `kernel` frames to the output for every frame, `stride` after the frame before it; nothing is cut.

    (b, t, in) -> (b, (t - 1) stride + kernel, out). The checkpoint's weight is (in, out, kernel). Kernel 3, stride 2,
    two frames x, y: [x w0, x w1, x w2 + y w0, y w1, y w2], and the bias on each.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int, int],
        *,
        stride: int,
        rows: str | None,
        compute: ComputePolicy,
        channels: tuple[str, str] = ("small", "embed"),
    ):
        # About kernel / stride frames of the input meet in one of the output.
        std = (max(1, shape[0] // stride) * shape[1]) ** -0.5
        self.weight = normal(key, shape, ("kernel", *channels), std=std)
        self.bias = zeros((shape[2],), channels[1:])
        self.stride, self.rows, self.compute = stride, rows, compute

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b s d"]:
        # Product, then overlap: as a product its weight has a gradient in fp32, which a backend's own would not.
        pieces = transposed_pieces(x, gather_weight(self.weight, self.compute), self.rows, self.compute)
        spec = self.compute.spec(self.rows, None, None)
        return add_bias(overlap_add(pieces, self.stride, spec), self.bias, self.compute)


def transposed_pieces(
    x: Float[Array, "b t c"], weight: Gathered, rows: str | None, compute: ComputePolicy
) -> Float[Array, "b t k d"]:
    """Returns what every frame of `x` adds to the output of a transposed convolution; `weight` is (k, c, d)."""
    spec = compute.spec(rows, None, None, None)
    return product("btc,kcd->btkd", x.astype(weight.value.dtype), weight, out=spec)


def overlap_add(pieces: Float[Array, "b t k d"], stride: int, spec: PartitionSpec | None) -> Float[Array, "b s d"]:
    """Sums pieces of k frames that start `stride` frames apart: (t - 1) stride + k frames, split as `spec`.

    Pieces are cut in blocks of `stride` frames, and block j of piece i lands in block i + j of the result: no scatter.
    """
    b, t, k, d = pieces.shape
    blocks = -(-k // stride)
    # Whole blocks, also where the stride does not divide k: the zeros behind a piece add nothing.
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, blocks * stride - k), (0, 0)))
    # As many shifted copies as blocks in a piece, added up: pads and sums fuse where a scatter would not.
    total = jnp.zeros((), pieces.dtype)
    for j in range(blocks):
        block = pieces[:, :, j * stride : (j + 1) * stride]
        total = total + jnp.pad(block, ((0, 0), (j, blocks - 1 - j), (0, 0), (0, 0)))
    joined = total.reshape(b, (t + blocks - 1) * stride, d, out_sharding=spec)
    return joined[:, : (t - 1) * stride + k]
