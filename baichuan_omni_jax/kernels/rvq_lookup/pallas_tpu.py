"""Residual lookup on TPUs: a Mosaic kernel a level, in which scores live and die in VMEM.

The grid is rows x codes x width. Products of one tile of rows and one of codes are summed over the width's tiles; then
the tile's scores |c|^2 / 2 - x.c are reduced to each row's least and its code, which are kept while the codes pass by.

Products are fp32 ones (Precision.HIGHEST, six bf16 passes): exact enough by themselves, at one cost for all data. One
pass and a re-rank of the candidates in fp32 should be cheaper by operation count; it has to be measured on a TPU first.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from baichuan_omni_jax.kernels.rvq_lookup.reference import half_norms, lookup_blocks

BLOCK_ROWS = 8192  # rows on their way through the levels at once
# A tile of fp32 operands takes 1 and 2 MiB, twice for the next one's copy, its scores 2 MiB: within 16 MiB of VMEM, and
# 170 FLOPs per byte read, where six passes leave a v6e 93 and the others less.
ROWS, CODES, WIDTH = 512, 1024, 512
LANES = 128


class _Level(NamedTuple):
    """Holds what the kernel reads of a codebook."""

    codebook: Float32[Array, "k d"]
    half_norms: Float32[Array, "1 k"]


def unsupported(x: Array, codebooks: Sequence[Array]) -> str | None:
    """Returns None: any sizes are tiled."""
    return None


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"]], *, interpret: bool = False
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Does as `reference.lookup`. `interpret` runs the kernel in plain JAX, on any platform: for tests."""
    width = x.shape[1]
    tile = _width_tile(width)
    padded = [jnp.pad(jnp.asarray(c, jnp.float32), ((0, 0), (0, -width % tile))) for c in codebooks]
    levels = [_Level(codebook, half_norms(codebook)[None]) for codebook in padded]
    x = jnp.pad(x, ((0, 0), (0, -width % tile)))
    codes, quantized, norms = lookup_blocks(x, levels, partial(_nearest, tile=tile, interpret=interpret), BLOCK_ROWS)
    return codes, quantized[:, :width], norms


def _width_tile(width: int) -> int:
    """Returns the whole width if small; else the largest tile that divides it, or at least its next multiple of 128."""
    if width <= WIDTH:
        return width
    lanes = -(-width // LANES)
    return LANES * max(tile for tile in range(1, WIDTH // LANES + 1) if lanes % tile == 0)


def _nearest(x: Float32[Array, "n d"], level: _Level, *, tile: int, interpret: bool) -> Int32[Array, " n"]:
    """Returns the nearest code of each row."""
    (rows, width), size = x.shape, level.codebook.shape[0]
    row_tile, code_tile = min(ROWS, rows), min(CODES, size)
    codes = pl.pallas_call(
        partial(_kernel, size=size),
        grid=(pl.cdiv(rows, row_tile), pl.cdiv(size, code_tile), width // tile),
        in_specs=[
            pl.BlockSpec((row_tile, tile), lambda i, j, k: (i, k)),
            pl.BlockSpec((code_tile, tile), lambda i, j, k: (j, k)),
            pl.BlockSpec((1, code_tile), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((row_tile, 1), lambda i, j, k: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((row_tile, code_tile), jnp.float32),
            pltpu.VMEM((row_tile, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        # Every tile of rows reads all codes; without an estimate XLA's scheduler takes the kernel for free.
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * level.codebook.shape[0],
            transcendentals=0,
            bytes_accessed=4 * (x.size + x.shape[0] + pl.cdiv(x.shape[0], row_tile) * level.codebook.size),
        ),
        interpret=interpret,
        name="rvq_nearest",
    )(x, level.codebook, level.half_norms)
    return codes[:, 0]


def _kernel(x_ref, codebook_ref, half_norms_ref, code_ref, products_ref, least_ref, *, size: int):
    """Keeps each row's least score so far and its code. NaN is less than nothing: code 0 stays."""
    j, k = pl.program_id(1), pl.program_id(2)

    @pl.when((j == 0) & (k == 0))
    def _start():
        least_ref[...] = jnp.full(least_ref.shape, jnp.inf, jnp.float32)
        code_ref[...] = jnp.zeros(code_ref.shape, jnp.int32)

    # One tile of the width: products are summed in VMEM until the whole width has passed.
    products = lax.dot_general(
        x_ref[...],
        codebook_ref[...],
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    @pl.when(k == 0)
    def _first():
        products_ref[...] = products

    @pl.when(k > 0)
    def _add():
        products_ref[...] += products

    @pl.when(k == pl.num_programs(2) - 1)
    def _compare():
        # A tile's least score and its first code; less than what earlier tiles had, or they stay: the first wins a tie.
        scores = half_norms_ref[...] - products_ref[...]
        code = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + j * scores.shape[1]
        scores = jnp.where(code < size, scores, jnp.inf)  # what lies beyond the last code is not initialized
        least = jnp.min(scores, 1, keepdims=True)
        first = jnp.min(jnp.where(scores == least, code, size), 1, keepdims=True)
        less = least < least_ref[...]
        code_ref[...] = jnp.where(less, first, code_ref[...])
        least_ref[...] = jnp.where(less, least, least_ref[...])
