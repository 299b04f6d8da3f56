"""Attention over packed rows that visits only the blocks in which something is visible."""

from baichuan_omni_jax.kernels.flash_attention.api import flash_attention, plan_blocks, whole_keys
from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan, Segments

__all__ = ["BlockPlan", "Segments", "flash_attention", "plan_blocks", "whole_keys"]
