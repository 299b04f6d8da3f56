"""Nearest codes of a residual vector quantizer, level by level."""

from baichuan_omni_jax.kernels.rvq_lookup.api import Prepared, prepare_codebooks, rvq_lookup

__all__ = ["Prepared", "prepare_codebooks", "rvq_lookup"]
