"""The small parts of layers, computed in fp32 whatever comes in: norms, rotary positions, activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from baichuan_omni_jax.nn.param import ComputePolicy, ones, use, zeros


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
