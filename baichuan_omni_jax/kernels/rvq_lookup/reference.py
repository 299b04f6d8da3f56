"""What a residual lookup means: every distance written out. The oracle of every other implementation."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"]]
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Level by level the nearest code by Euclidean distance, subtracted from what is left. Holds (n, size, d)."""
    residual, total, codes, norms = x, jnp.zeros(x.shape, jnp.float32), [], []
    for codebook in codebooks:
        codebook = codebook.astype(jnp.float32)
        difference = residual.astype(jnp.float32)[:, None] - codebook[None]
        code = jnp.argmin(jnp.sum(difference * difference, -1), -1).astype(jnp.int32)
        chosen = codebook[code]
        residual = residual - chosen.astype(x.dtype)
        total = total + chosen
        codes.append(code)
        norms.append(jnp.sqrt(jnp.sum(jnp.square(residual.astype(jnp.float32)), -1)))
    return jnp.stack(codes, -1), total.astype(x.dtype), jnp.stack(norms, -1)
