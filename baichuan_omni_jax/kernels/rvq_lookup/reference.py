"""What a residual lookup means: every distance written out. The oracle of every other implementation.

Below it, what the other implementations share (blocks of rows, and the residual's way through the levels) and the
codebooks that all are tried on: `SMALL` for the reference, which holds (rows, codes, width), and for interpreted
kernels; `RELEASED` for compilation and timing. Both have eight levels whose sizes differ and shrink.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

Nearest = Callable[[Array, Any], Array]


def subtract(residual: Float[Array, "n d"], chosen: Float[Array, "n d"], dtype: jnp.dtype) -> Float[Array, "n d"]:
    """Returns the next residual: fp32 numbers that `dtype` can hold.

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
    """Finds level by level the nearest code by Euclidean distance, subtracted from what is left. Holds (n, size, d)."""
    residual, total, codes, norms = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32), [], []
    for codebook in codebooks:
        codebook = jnp.asarray(codebook, jnp.float32)
        # Written out, (n, size, d): no expansion of the square, so nothing cancels.
        difference = residual[:, None] - codebook[None]
        code = jnp.argmin(jnp.sum(difference * difference, -1), -1).astype(jnp.int32)
        chosen = codebook[code]
        residual = subtract(residual, chosen, x.dtype)
        total = total + chosen
        codes.append(code)
        norms.append(jnp.sqrt(jnp.sum(residual * residual, -1)))
    return jnp.stack(codes, -1), total.astype(x.dtype), jnp.stack(norms, -1)


def unsupported(x: Array, codebooks: Sequence[Array]) -> str | None:
    """Returns None: it runs everywhere."""
    return None


def lookup_blocks(
    x: Float[Array, "n d"], levels: Sequence[Any], nearest: Nearest, block_rows: int
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Looks up at most `block_rows` rows at a time, so that what a block needs does not grow with n.

    Args:
        x: vectors (n, d).
        levels: what `nearest` needs of each level; `level.codebook` is (size, d) fp32.
        nearest: `nearest(residual (block, d) fp32, level)` gives a level's codes.
        block_rows: rows at a time, at most.

    Returns:
        As `lookup`.
    """
    rows, width = x.shape
    # Blocks as even as can be: rows that only fill one up cost as much as others.
    blocks = -(-rows // block_rows)
    block = -(-rows // blocks)
    x = jnp.pad(x, ((0, blocks * block - rows), (0, 0))).reshape(blocks, block, width)
    results = lax.map(lambda piece: _lookup_block(piece, levels, nearest), x)
    return tuple(result.reshape(blocks * block, -1)[:rows] for result in results)


def _lookup_block(x: Float[Array, "n d"], levels: Sequence[Any], nearest: Nearest) -> tuple[Array, Array, Array]:
    """Takes one block of rows through the levels."""
    residual, total, codes, norms = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32), [], []
    # One level after another: each quantizes what the ones before left over.
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
    """Returns |c|^2 / 2, what a code's score |c|^2 / 2 - x.c starts from."""
    return 0.5 * jnp.sum(codebook * codebook, -1)


@dataclass(frozen=True)
class Case:
    """Codebooks of `sizes` codes, `width` numbers each."""

    name: str
    width: int
    sizes: tuple[int, ...]

    def codebooks(self, seed: int = 0) -> list[np.ndarray]:
        """Normal codes, each level at 0.7 of the scale of the level before: residuals shrink as in a trained stack."""
        rng = np.random.default_rng(seed)
        scales = 0.7 ** np.arange(len(self.sizes))
        return [
            rng.standard_normal((size, self.width), np.float32) * np.float32(scale)
            for size, scale in zip(self.sizes, scales, strict=True)
        ]

    def frames(self, rows: int, codebooks: list[np.ndarray], noise: float, seed: int = 1) -> np.ndarray:
        """A random code of each level, summed, plus normal noise of the first level's scale times `noise`."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((rows, self.width), np.float32) * np.float32(noise)
        for codebook in codebooks:
            x += codebook[rng.integers(0, len(codebook), rows)]
        return x


# Two of the sizes are no multiple of any tile; the width is none of a power of two.
SMALL = Case("small", 160, (300, 129, 64, 33, 33, 33, 33, 33))
RELEASED = Case("released", 5120, (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024))
