"""Sizes of the vision tower and its projector, and the pixel limits of what it is shown."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PixelLimits:
    """Area limits, in pixels, that smart resizing keeps (`min_pixels <= height * width <= max_pixels`)."""

    min_pixels: int = 3136
    max_pixels: int = 3211264


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Qwen2-VL style tower (`visual_model`) and the projector into the language model (`visual_bridge_model`)."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: int = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    out_dim: int = 3584
    norm_eps: float = 1e-6
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_limits: PixelLimits = PixelLimits()
    frame_limits: PixelLimits = PixelLimits(max_pixels=602112)
    max_frames: int = 32
    frames_per_second: float = 1.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one temporal slice of a patch: channels x 14 x 14 = 588."""
        return self.in_channels * self.patch_size**2

    @property
    def merged_patches(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2
