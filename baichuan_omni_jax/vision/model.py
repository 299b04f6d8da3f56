"""The vision branch: a ViT over patches of many images and frames packed in a row, and the projector behind it.

    pixels --PatchEmbedding--> patches --VisionTower--> states --Projector--> visual tokens (one for 2 x 2 patches)

`model.visual_model.*` and `model.visual_bridge_model.*` of the checkpoint. Differs from the released model in form
only: the fused qkv is three projections, layers are stacked and scanned, frames are separated by segment ids, and
pixels arrive as uint8. Rows are split over (data, fsdp) and patches over (context, tensor); no frame straddles a
shard, so the tower communicates nothing but its weights.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8

from baichuan_omni_jax.config.architecture import VisionConfig
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, run_encoder
from baichuan_omni_jax.nn.layers import LayerNorm, gelu, quick_gelu, rope_angles
from baichuan_omni_jax.nn.linear import Linear, narrow, product
from baichuan_omni_jax.nn.param import ComputePolicy, normal, split_as, stack, use
from baichuan_omni_jax.sharding import placement

THETA = 10000.0  # base of the rotary frequencies, of rows and columns alike


def normalize_pixels(
    patches: UInt8[Array, "b p v"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b p v"]:
    """Computes (pixel / 255 - mean) / std per channel, fp32. A patch's values are ordered (channel, row, column)."""
    per_channel = patches.shape[-1] // len(mean)
    shift, spread = (np.repeat(np.asarray(x, np.float32), per_channel) for x in (mean, std))
    return (patches.astype(jnp.float32) / 255.0 - shift) / spread


def grid_angles(grid: Int32[Array, "b p 2"], head_dim: int) -> Float[Array, "b p half"]:
    """Returns rotary angles of (row, column): head_dim/4 of the row, then as many of the column.

    head_dim 8: frequencies 1 and 0.01, so row 2, column 3 has angles [2, 0.02, 3, 0.03].
    """
    return jnp.concatenate([rope_angles(grid[..., axis], head_dim // 2, THETA) for axis in (0, 1)], -1)


class PatchEmbedding(nnx.Module):
    """Embeds patches: the checkpoint's convolution (`patch_embed.proj`) as one matrix product, no bias.

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
            # Normalized on the device: a fourth of the bytes come from the host.
            if pixels:
                patches = normalize_pixels(patches, cfg.image_mean, cfg.image_std)
            dtype = self.compute.dtype
            spec = self.compute.spec("batch", "media", None)
            # fp32 until the two temporal slices are summed: in bf16 their sum would be rounded twice.
            kernel = use(self.kernel, self.compute, jnp.float32)
            if patches.shape[-1] == values:
                return product("bpv,vd->bpd", patches.astype(dtype), narrow(kernel.sum(0), dtype), out=spec)
            # Both slices, in the checkpoint's order (channel, temporal, row, column).
            area = cfg.patch_size**2
            patches = patches.reshape(*patches.shape[:2], cfg.in_channels, slices, area)
            kernel = kernel.reshape(slices, cfg.in_channels, area, cfg.embed_dim)
            return product("bpcsa,scad->bpd", patches.astype(dtype), narrow(kernel, dtype), out=spec)


# Logical axes of a packed row of patches: rows, and patches over every axis that is left.
ROWS = ("batch", "media")


class VisionTower(nnx.Module):
    """Encodes patches: embedding and `depth` pre-norm layers with 2-D rotary positions; no norm at the end."""

    def __init__(self, key: PRNGKeyArray, cfg: VisionConfig, compute: ComputePolicy):
        keys = jax.random.split(key)
        self.sizes = EncoderSizes(
            width=cfg.embed_dim,
            heads=cfg.num_heads,
            ffn=cfg.embed_dim * cfg.mlp_ratio,
            eps=cfg.norm_eps,
            rows=ROWS,
            activation=quick_gelu,
        )
        self.patch_embedding = PatchEmbedding(keys[0], cfg, compute)
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[1], cfg.depth)
        self.compute = compute

    def __call__(
        self,
        patches: Float[Array, "b p v"] | UInt8[Array, "b p v"],
        patch_grid: Int32[Array, "b p 2"],
        patch_segments: Int32[Array, "b p"],
    ) -> Float[Array, "b p d"]:
        """Returns hidden states of the patches. Each sees the patches of its own segment (a frame); 0 is padding."""
        # Positions are all equal: attention within a frame is bidirectional, and where a patch lies is in its angles.
        x = self.patch_embedding(patches)
        angles = grid_angles(patch_grid, self.sizes.head_dim)
        return run_encoder(
            self.layers,
            x,
            patch_segments,
            jnp.zeros_like(patch_segments),
            sizes=self.sizes,
            compute=self.compute,
            angles=angles,
        )


class Projector(nnx.Module):
    """Projects patches: LayerNorm -> 4 neighbors side by side -> linear -> GELU -> linear into the LLM's width."""

    def __init__(self, key: PRNGKeyArray, cfg: VisionConfig, compute: ComputePolicy):
        keys = jax.random.split(key)
        g, d, f = cfg.merged_patches, cfg.embed_dim, cfg.merged_patches * cfg.embed_dim
        out = (*ROWS, None)
        self.norm = LayerNorm(d, eps=cfg.norm_eps, compute=compute)
        self.fc1 = Linear(
            keys[0], "bpgd,gdf->bpf", (g, d, f), ("small", "embed", "small"), out=out, compute=compute, bias=True
        )
        self.fc2 = Linear(
            keys[1], "bpf,fd->bpd", (f, cfg.out_dim), ("small", "embed"), out=out, compute=compute, bias=True
        )
        self.group = g

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b tokens out"]:
        """Maps (b, p, d) to (b, p/4, out): patches arrive with the four of a token next to each other."""
        # The norm is each patch's own; concatenation and first linear are one product over (neighbor, channel).
        x = group_patches(self.norm(x), self.group)
        return self.fc2(gelu(self.fc1(x)))


class VisionModel(nnx.Module):
    """Embeds images and video frames (arXiv:2501.15368): the branch `vision`, tower and projector.

    >>> from baichuan_omni_jax.nn.param import initialize
    >>> cfg = VisionConfig(depth=1, embed_dim=16, num_heads=2, patch_size=4, out_dim=8)
    >>> model = initialize(VisionModel, jax.random.key(0), cfg, ComputePolicy())
    >>> grid = jnp.array([[[0, 0], [0, 1], [1, 0], [1, 1]]], jnp.int32)
    >>> model(jnp.zeros((1, 4, 48), jnp.uint8), grid, jnp.ones((1, 4), jnp.int32)).shape
    (1, 1, 8)
    """

    def __init__(self, key: PRNGKeyArray, cfg: VisionConfig, compute: ComputePolicy):
        keys = jax.random.split(key)
        self.tower = VisionTower(keys[0], cfg, compute)
        self.projector = Projector(keys[1], cfg, compute)
        self.cfg, self.compute = cfg, compute

    def __call__(
        self,
        patches: Float[Array, "b p v"] | UInt8[Array, "b p v"],
        patch_grid: Int32[Array, "b p 2"],
        patch_segments: Int32[Array, "b p"],
    ) -> Float[Array, "b tokens d"]:
        """Embeds the patches of a packed row.

        Args:
            patches: 588 uint8 values of one temporal slice (b, p, 588), or normalized floats of one slice or of both
                (1176), in the order that groups 2 x 2 neighbors.
            patch_grid: row and column of each patch in its frame (b, p, 2).
            patch_segments: the frame's id (b, p), 0 for padding.

        Returns:
            Visual embeddings (b, p/4, out_dim), zero for padding.

        Raises:
            ValueError: other shapes.
        """
        if patches.shape[:2] != patch_segments.shape or patch_grid.shape != (*patches.shape[:2], 2):
            raise ValueError(
                f"patches {patches.shape}, patch_grid {patch_grid.shape}, patch_segments {patch_segments.shape}: "
                "rows and patches must agree"
            )
        if patches.shape[1] % self.cfg.merged_patches:
            raise ValueError(f"{patches.shape[1]} patches are not a multiple of {self.cfg.merged_patches}")
        # A caller may hand in arrays of any placement: from here on patches lie where they are computed with.
        patches, patch_grid, patch_segments = (
            split_as(x, self.compute, *ROWS) for x in (patches, patch_grid, patch_segments)
        )
        with jax.named_scope("vision_tower"):
            x = self.tower(patches, patch_grid, patch_segments)
        with jax.named_scope("projector"):
            tokens = self.projector(x)
            # A token is real where one of its patches is: padding comes in whole groups.
            real = group_patches(patch_segments, self.cfg.merged_patches).max(-1) > 0
            return jnp.where(real[..., None], tokens, 0)


def group_patches(x: Array, group: int) -> Array:
    """Cuts (b, p, ...) into (b, p/group, group, ...), split over devices as before."""
    shape = (x.shape[0], x.shape[1] // group, group, *x.shape[2:])
    spec = jax.typeof(x).sharding.spec
    return x.reshape(shape, out_sharding=placement(PartitionSpec(*spec[:2], None, *spec[2:])))
