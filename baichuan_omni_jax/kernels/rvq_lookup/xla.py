"""Residual lookup on any platform: a bf16 search that cannot miss the nearest code, then an fp32 choice.

|x - c|^2 / 2 = |x|^2 / 2 + |c|^2 / 2 - x.c, and |x|^2 is the same for every code, so a code's score is |c|^2 / 2 - x.c.
The products of all pairs are taken of x and c rounded to bf16, at half the cost of fp32 where there are bf16 units.
With x' and c' the rounded ones, Cauchy-Schwarz bounds what the rounding can have done to a score:

    |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|

and summing d exact products in fp32, in any order, adds at most d 2^-24 |x'| |c'|. A code whose lowest possible score
lies above that of another, taken in fp32, is out. What is left is mostly one code a row; where it is a few, their fp32
distances are written out and compared, and a row with more than CANDIDATES is compared with all codes in fp32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32

from baichuan_omni_jax.kernels.rvq_lookup.reference import half_norms, lookup_blocks


def has_bf16_units(processor: str) -> bool:
    """Tells by `/proc/cpuinfo` whether the processor multiplies bf16 faster than fp32; others than x86 are trusted to.

    >>> has_bf16_units("flags : avx2 fma"), has_bf16_units("flags : avx512f avx512_bf16")
    (False, True)
    """
    flags = next((line.split() for line in processor.splitlines() if line.startswith("flags")), None)
    return flags is None or not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


_PROCESSOR = Path("/proc/cpuinfo")
# Numbers in a codebook from which a search is worth what it compiles to; below, fp32 products of all. Without bf16
# units a search converts first and multiplies in fp32 all the same: 1.06 of torch.cdist's speed, products of all 1.85.
SEARCHED = 2**20 if has_bf16_units(_PROCESSOR.read_text() if _PROCESSOR.exists() else "") else 2**62
BLOCK_ROWS = 2048  # rows searched at once: memory of (block, largest codebook)
CANDIDATES = 16  # codes a row may keep after the search
PAIRS = 128  # (row, candidate) pairs whose distances are written out at once
FULL_ROWS = 32  # rows compared with all codes at once
SLACK = 1.001  # covers the rounding of the bound itself


class Prepared(NamedTuple):
    """Holds a codebook with what every lookup needs of it. Small ones are not searched and have nothing rounded."""

    codebook: Float32[Array, "k d"]
    half_norms: Float32[Array, " k"]  # |c|^2 / 2
    rounded: BFloat16[Array, "k d"] | None
    errors: Float32[Array, " k"] | None  # |c - c'|

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codebook.shape


def unsupported(x: Array, codebooks: Sequence[Array]) -> str | None:
    """Returns None: it runs everywhere."""
    return None


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"] | Prepared], *, block_rows: int = BLOCK_ROWS
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Does as `reference.lookup`. Codebooks that are not `prepare`d are prepared in every call."""
    levels = [book if isinstance(book, Prepared) else prepare(book) for book in codebooks]
    return lookup_blocks(x, levels, nearest, block_rows)


def prepare(codebook: Float[Array | np.ndarray, "k d"]) -> Prepared:
    """Returns what a lookup needs of a codebook; keeps it once more in bf16."""
    codebook = jnp.asarray(codebook, jnp.float32)
    rounded, errors = _round(codebook) if codebook.size >= SEARCHED else (None, None)
    return Prepared(codebook, half_norms(codebook), rounded, errors)


def _round(x: Float32[Array, "n d"]) -> tuple[BFloat16[Array, "n d"], Float32[Array, " n"]]:
    """Returns `x` in bf16 and the length of what that took away."""
    rounded = lax.optimization_barrier(x.astype(jnp.bfloat16))  # or a compiler may skip the way there and back
    return rounded, jnp.linalg.norm(x - rounded.astype(jnp.float32), axis=-1)


def nearest(x: Float32[Array, "n d"], level: Prepared) -> Int32[Array, " n"]:
    """Returns the nearest code of each row, the first on a tie."""
    if level.rounded is None:
        return _nearest_of_all(x, level)
    # Search in bf16; where several candidates are left compare these, where too many, all codes, in fp32.
    candidates, kept, complete = search(x, level)
    several = complete & (jnp.sum(kept, -1) > 1)
    code = _closest_candidate(x, level.codebook, candidates, kept & several[:, None])
    return _compare_with_all(x, level, code, ~complete)


def search(
    x: Float32[Array, "n d"], level: Prepared
) -> tuple[Int32[Array, "n m"], Bool[Array, "n m"], Bool[Array, " n"]]:
    """Finds the likeliest codes of each row, which of them can be the nearest, and whether no other code can.

    A code is out when its lowest possible score lies above the score, in fp32, of the likeliest one.
    """
    size = level.codebook.shape[0]
    count = min(CANDIDATES, size)
    # Without the barrier XLA:CPU looks through the results' uses and sorts whole rows.
    least, candidates = lax.optimization_barrier(lax.top_k(-_lowest(x, level), count))
    highest = _highest(x, level, candidates[:, 0])
    kept = -least <= highest[:, None]
    complete = jnp.isfinite(highest)  # NaN and infinity are in no order
    if count < size:
        complete &= ~kept[:, -1]
    return candidates, kept, complete


def _lowest(x: Float32[Array, "n d"], level: Prepared) -> Float32[Array, "n k"]:
    """Returns the lowest that each score can be."""
    if level.rounded is None or level.errors is None:
        raise ValueError("a small codebook has nothing to search")
    rounded, error = _round(x)
    length = jnp.linalg.norm(rounded.astype(jnp.float32), axis=-1)
    summing = x.shape[1] * 2.0**-24
    products = lax.dot_general(rounded, level.rounded, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    # Cauchy-Schwarz on what rounding took of x and of c, plus what summing in fp32 may add.
    bound = (error + summing * length)[:, None] * jnp.sqrt(2 * level.half_norms) + length[:, None] * level.errors
    return level.half_norms - products - SLACK * (bound + summing * level.half_norms)


def _highest(x: Float32[Array, "n d"], level: Prepared, code: Int32[Array, " n"]) -> Float32[Array, " n"]:
    """Returns the highest that the score of each row's code can be: fp32, plus what summing in fp32 may lose."""
    chosen, half = level.codebook[code], level.half_norms[code]
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.sqrt(2 * half)
    return half - jnp.sum(x * chosen, -1) + SLACK * x.shape[1] * 2.0**-24 * (lengths + half)


def _closest_candidate(x: Array, codebook: Array, candidates: Array, kept: Array) -> Int32[Array, " n"]:
    """Returns the nearest of the kept candidates in fp32, the lowest code on a tie; the first where none is kept."""
    count = candidates.shape[1]
    places, blocks = _places(kept.reshape(-1), PAIRS)

    # Only the kept pairs, in blocks of PAIRS: as many blocks as there is something in.
    def measure(block: Array, distances: Array) -> Array:
        place = lax.dynamic_slice_in_dim(places, block * PAIRS, PAIRS)
        difference = x[place // count] - codebook[candidates.reshape(-1)[place]]
        return distances.at[place].set(jnp.sum(difference * difference, -1), mode="drop")

    distances = lax.fori_loop(0, blocks, measure, jnp.zeros(kept.size, jnp.float32)).reshape(kept.shape)
    distances = jnp.where(kept, distances, jnp.inf)
    tied = kept & (distances == jnp.min(distances, -1, keepdims=True))
    lowest = jnp.min(jnp.where(tied, candidates, codebook.shape[0]), -1)
    return jnp.where(jnp.any(kept, -1), lowest, candidates[:, 0]).astype(jnp.int32)


def _compare_with_all(x: Array, level: Prepared, code: Array, rows: Bool[Array, " n"]) -> Int32[Array, " n"]:
    """Replaces the code of chosen rows (and of others, to fill a block) by the nearest of all codes in fp32."""
    places, blocks = _places(rows, FULL_ROWS)

    def compare(block: Array, code: Array) -> Array:
        place = lax.dynamic_slice_in_dim(places, block * FULL_ROWS, FULL_ROWS)
        return code.at[place].set(_nearest_of_all(x[place], level), mode="drop")

    return lax.fori_loop(0, blocks, compare, code)


def _nearest_of_all(x: Float32[Array, "n d"], level: Prepared) -> Int32[Array, " n"]:
    """Compares rows with all codes in fp32; ties go to the first."""
    products = jnp.einsum("nd,kd->nk", x, level.codebook, precision=lax.Precision.HIGHEST)
    return jnp.argmin(level.half_norms - products, -1).astype(jnp.int32)


def _places(chosen: Bool[Array, " n"], block: int) -> tuple[Int32[Array, " m"], Int32[Array, ""]]:
    """Returns places of the chosen, of the others, then n (no place) to whole blocks; and how many have chosen."""
    size = chosen.shape[0]
    places = jnp.argsort(~chosen).astype(jnp.int32)
    places = jnp.pad(places, (0, -size % block), constant_values=size)
    return places, -(-jnp.sum(chosen, dtype=jnp.int32) // block)
