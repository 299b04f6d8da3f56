"""RMSNorm and LayerNorm over the last axis, in fp32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from baichuan_omni_jax.nn.param import Compute, ones, use, zeros


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, width: int, *, eps: float, compute: Compute):
        self.scale = ones((width,), ("norm",))
        self.eps, self.compute = eps, compute

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with jax.named_scope("rms_norm"):
            wide = x.astype(jnp.float32)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
            return (wide * use(self.scale, self.compute, jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias."""

    def __init__(self, width: int, *, eps: float, compute: Compute):
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
