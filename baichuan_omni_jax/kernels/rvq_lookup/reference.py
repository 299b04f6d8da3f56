"""What a residual lookup means: every distance written out. The oracle of every other implementation."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def subtract(residual: Float[Array, "n d"], chosen: Float[Array, "n d"], dtype: jnp.dtype) -> Float[Array, "n d"]:
    """The next residual: fp32 numbers that `dtype` can hold.

    The rounding is explicit, because a compiler may keep more digits than a cast to bf16 and back asks for.
    """
    if dtype == jnp.float32:
        return residual - chosen
    info = jnp.finfo(dtype)
    chosen = lax.reduce_precision(chosen, info.nexp, info.nmant)
    return lax.reduce_precision(residual - chosen, info.nexp, info.nmant)


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"]]
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Level by level the nearest code by Euclidean distance, subtracted from what is left. Holds (n, size, d)."""
    residual, total, codes, norms = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32), [], []
    for codebook in codebooks:
        codebook = jnp.asarray(codebook, jnp.float32)
        difference = residual[:, None] - codebook[None]
        code = jnp.argmin(jnp.sum(difference * difference, -1), -1).astype(jnp.int32)
        chosen = codebook[code]
        residual = subtract(residual, chosen, x.dtype)
        total = total + chosen
        codes.append(code)
        norms.append(jnp.sqrt(jnp.sum(residual * residual, -1)))
    return jnp.stack(codes, -1), total.astype(x.dtype), jnp.stack(norms, -1)
