"""Residual lookup as matrix products, a block of rows at a time: any platform, memory of (block, largest codebook).

|x - c|^2 = |x|^2 + |c|^2 - 2 x.c, and |x|^2 is the same for every code, so only |c|^2 / 2 - x.c is compared.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.kernels.rvq_lookup.reference import subtract

BLOCK_ROWS = 1024


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"]], *, block_rows: int = BLOCK_ROWS
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """See `reference.lookup`."""
    rows, width = x.shape
    levels = [_with_half_norms(codebook) for codebook in codebooks]
    block = max(1, min(block_rows, rows))
    blocks = -(-rows // block)
    x = jnp.pad(x, ((0, blocks * block - rows), (0, 0))).reshape(blocks, block, width)
    results = lax.map(lambda piece: _lookup_block(piece, levels), x)
    return tuple(result.reshape(blocks * block, -1)[:rows] for result in results)


def _with_half_norms(codebook: Float[Array, "k d"]) -> tuple[Float[Array, "k d"], Float[Array, " k"]]:
    codebook = jnp.asarray(codebook, jnp.float32)
    return codebook, 0.5 * jnp.sum(codebook * codebook, -1)


def _lookup_block(x: Float[Array, "n d"], levels):
    residual, total, codes, norms = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32), [], []
    for codebook, half_norms in levels:
        products = jnp.einsum("nd,kd->nk", residual, codebook, precision=lax.Precision.HIGHEST)
        code = jnp.argmin(half_norms - products, -1).astype(jnp.int32)
        chosen = codebook[code]
        residual = subtract(residual, chosen, x.dtype)
        total = total + chosen
        codes.append(code)
        norms.append(jnp.sqrt(jnp.sum(residual * residual, -1)))
    return jnp.stack(codes, -1), total.astype(x.dtype), jnp.stack(norms, -1)
