"""Patches as the tower receives them: normalizing pixels, embedding, and the rotary angles of a patch's place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8

from baichuan_omni_jax.nn.param import ComputePolicy, normal, use
from baichuan_omni_jax.nn.products import narrow, product
from baichuan_omni_jax.nn.rope import rope_angles
from baichuan_omni_jax.vision.config import VisionConfig

THETA = 10000.0


def normalize_pixels(
    patches: UInt8[Array, "b p v"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b p v"]:
    """(pixel / 255 - mean) / std per channel, fp32. A patch's values are ordered (channel, row, column)."""
    per_channel = patches.shape[-1] // len(mean)
    mean, std = (np.repeat(np.asarray(x, np.float32), per_channel) for x in (mean, std))
    return (patches.astype(jnp.float32) / 255.0 - mean) / std


def grid_angles(grid: Int32[Array, "b p 2"], head_dim: int) -> Float[Array, "b p half"]:
    """Rotary angles of (row, column): head_dim/4 of the row, then as many of the column.

    head_dim 8: frequencies 1 and 0.01, so row 2, column 3 has angles [2, 0.02, 3, 0.03].
    """
    return jnp.concatenate([rope_angles(grid[..., axis], head_dim // 2, THETA) for axis in (0, 1)], -1)


class PatchEmbedding(nnx.Module):
    """The convolution that embeds a patch (`patch_embed.proj`), as one matrix product, no bias.

    `kernel` is (temporal, channel * row * column, width); the checkpoint's is (width, channel, temporal, 14, 14). A
    still shows the same slice at both times, so for one slice the kernel's two are summed.
    """

    def __init__(self, key: PRNGKeyArray, cfg: VisionConfig, compute: ComputePolicy):
        shape = (cfg.temporal_patch_size, cfg.patch_values, cfg.embed_dim)
        std = (cfg.temporal_patch_size * cfg.patch_values) ** -0.5
        self.kernel = normal(key, shape, ("kernel", "small", "embed"), std=std)
        self.cfg, self.compute = cfg, compute

    def __call__(self, patches: Float[Array, "b p v"] | UInt8[Array, "b p v"]) -> Float[Array, "b p d"]:
        """Embeds 588 values a patch (uint8 pixels or normalized floats) or 1176 normalized (channel, temporal, 14, 14).

        Raises ValueError on another number of values, or on uint8 pixels of two slices.
        """
        cfg, slices, values = self.cfg, self.cfg.temporal_patch_size, self.cfg.patch_values
        pixels = patches.dtype == jnp.uint8
        if patches.shape[-1] not in ((values,) if pixels else (values, values * slices)):
            raise ValueError(
                f"patches {patches.dtype} {patches.shape}: expected {values} uint8 or normalized values a patch, "
                f"or {values * slices} normalized ones"
            )
        with jax.named_scope("patch_embedding"):
            if pixels:
                patches = normalize_pixels(patches, cfg.image_mean, cfg.image_std)
            dtype = self.compute.dtype
            spec = self.compute.rules.spec("batch", "media", None)
            kernel = use(self.kernel, self.compute, jnp.float32)
            if patches.shape[-1] == values:
                return product("bpv,vd->bpd", patches.astype(dtype), narrow(kernel.sum(0), dtype), out=spec)
            area = cfg.patch_size**2
            patches = patches.reshape(*patches.shape[:2], cfg.in_channels, slices, area)
            kernel = kernel.reshape(slices, cfg.in_channels, area, cfg.embed_dim)
            return product("bpcsa,scad->bpd", patches.astype(dtype), narrow(kernel, dtype), out=spec)
