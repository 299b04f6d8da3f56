"""What every implementation but the reference shares: blocks of rows, and the residual's way through the levels."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from baichuan_omni_jax.kernels.rvq_lookup.reference import subtract

Nearest = Callable[[Array, Any], Array]


def lookup_blocks(
    x: Float[Array, "n d"], levels: Sequence[Any], nearest: Nearest, block_rows: int
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """`rvq_lookup` of at most `block_rows` rows at a time, so that what a block needs does not grow with n.

    `nearest(residual (block, d) fp32, level)` gives a level's codes; `level.codebook` is (size, d) fp32.
    """
    rows, width = x.shape
    # Blocks as even as can be: rows that only fill one up cost as much as others.
    blocks = -(-rows // block_rows)
    block = -(-rows // blocks)
    x = jnp.pad(x, ((0, blocks * block - rows), (0, 0))).reshape(blocks, block, width)
    results = lax.map(lambda piece: _lookup_block(piece, levels, nearest), x)
    return tuple(result.reshape(blocks * block, -1)[:rows] for result in results)


def _lookup_block(x: Float[Array, "n d"], levels: Sequence[Any], nearest: Nearest):
    residual, total, codes, norms = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32), [], []
    for level in levels:
        code = nearest(residual, level)
        # Computed once each: a compiler may else do it again for every use.
        chosen = lax.optimization_barrier(level.codebook[code])
        residual = lax.optimization_barrier(subtract(residual, chosen, x.dtype))
        total = total + chosen
        codes.append(code)
        norms.append(jnp.sqrt(jnp.sum(residual * residual, -1)))
    return jnp.stack(codes, -1), total.astype(x.dtype), jnp.stack(norms, -1)


def half_norms(codebook: Float32[Array, "k d"]) -> Float32[Array, " k"]:
    """|c|^2 / 2, what a code's score |c|^2 / 2 - x.c starts from."""
    return 0.5 * jnp.sum(codebook * codebook, -1)
