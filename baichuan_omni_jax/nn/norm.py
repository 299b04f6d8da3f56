"""RMSNorm and LayerNorm over the last axis, GroupNorm over an item, in fp32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from baichuan_omni_jax.nn.param import ComputePolicy, ones, use, zeros


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with jax.named_scope("rms_norm"):
            wide = x.astype(jnp.float32)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
            return (wide * use(self.scale, self.compute, jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias."""

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.bias = zeros((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with jax.named_scope("layer_norm"):
            wide = x.astype(jnp.float32)
            wide = wide - jnp.mean(wide, -1, keepdims=True)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
            wide = wide * use(self.scale, self.compute, jnp.float32) + use(self.bias, self.compute, jnp.float32)
            return wide.astype(x.dtype)


class GroupNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, mean and variance over all channels of an item's counted frames.

    One group (PyTorch's `GroupNorm(1, width)`). With every frame counted, padding moves the statistics.
    """

    def __init__(self, width: int, *, eps: float, compute: ComputePolicy):
        self.scale = ones((width,), ("norm",))
        self.bias = zeros((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "b t c"], counted: Bool[Array, "b t"]) -> Float[Array, "b t c"]:
        with jax.named_scope("group_norm"):
            wide, counted = x.astype(jnp.float32), counted[..., None]
            values = jnp.maximum(counted.sum((1, 2), keepdims=True) * x.shape[2], 1)
            wide = wide - jnp.where(counted, wide, 0).sum((1, 2), keepdims=True) / values
            variance = jnp.where(counted, wide * wide, 0).sum((1, 2), keepdims=True) / values
            wide = wide * jax.lax.rsqrt(variance + self.eps)
            wide = wide * use(self.scale, self.compute, jnp.float32) + use(self.bias, self.compute, jnp.float32)
            return wide.astype(x.dtype)
