"""Items of different lengths in one array: which frames are an item's own, and nearest resizing."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def frames_before(lengths: Int32[Array, " m"], frames: int) -> Bool[Array, "m t"]:
    """True for the first `lengths[i]` of `frames` frames: lengths [1, 3], 3 frames -> [[1, 0, 0], [1, 1, 1]]."""
    return jnp.arange(frames) < lengths[:, None]


def keep(x: Float[Array, "m t ..."], lengths: Int32[Array, " m"]) -> Float[Array, "m t ..."]:
    """`x`, zero past each item's length."""
    real = frames_before(lengths, x.shape[1])
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


def resize_nearest(
    x: Float[Array, "m t c"], lengths: Int32[Array, " m"], new_lengths: Int32[Array, " m"], frames: int
) -> Float[Array, "m s c"]:
    """Each item's first `lengths` frames stretched to `new_lengths`, in an array of `frames` frames.

    Frame i is frame floor(i * (length / new length)) of the input, the ratio rounded to fp32 as PyTorch does; past the
    new length it repeats the last one. 4 frames to 3: frames 0, 1, 2 of [0, 1.33, 2.67].
    """
    ratio = lengths.astype(jnp.float32) / jnp.maximum(new_lengths, 1).astype(jnp.float32)
    index = jnp.floor(jnp.arange(frames, dtype=jnp.float32) * ratio[:, None]).astype(jnp.int32)
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(x, jnp.minimum(index, last[:, None])[..., None], 1)
