"""Rotary position embedding, half-split, angles and rotation in fp32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def rope_angles(positions: Int32[Array, "b t"], head_dim: int, theta: float) -> Float[Array, "b t half"]:
    """Angle of each position and frequency: position * theta^(-2i / head_dim), i = 0 .. head_dim/2 - 1.

    head_dim 4, theta 100: frequencies 1 and 0.1, so position 3 has angles [3, 0.3].
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate(x: Float[Array, "b t n h"], angles: Float[Array, "b t half"]) -> Float[Array, "b t n h"]:
    """Turns (x1, x2), the two halves of h, by each angle: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
