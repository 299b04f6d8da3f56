"""Residual lookup on NVIDIA GPUs: a Triton kernel a level, in which scores live and die in registers.

One program holds a tile of rows and walks all codes, tile by tile, keeping each row's least score |c|^2 / 2 - x.c and
its code. Products are of fp32's precision without TF32: each operand is cut into three bf16 parts and the six largest
products of parts are summed in fp32 on the tensor cores (what is dropped is below 2^-24 of |x| |c|), which is several
times the rate of fp32 arithmetic there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from baichuan_omni_jax.kernels.rvq_lookup.reference import half_norms, lookup_blocks

BLOCK_ROWS = 16384  # rows on their way through the levels at once; offsets into a block stay below 2^31
# 8 warps hold 128 x 128 sums in 64 registers a thread; a step's operands are 2 x 16 KiB of fp32 and their bf16 parts.
ROWS, CODES, WIDTH = 128, 128, 32
WARPS, STAGES = 8, 2
SMALLEST = 16  # a tensor core product's least side


class _Level(NamedTuple):
    """Holds what the kernel reads of a codebook."""

    codebook: Float32[Array, "k d"]
    half_norms: Float32[Array, " k"]


def unsupported(x: Array, codebooks: Sequence[Array]) -> str | None:
    """Returns why the kernel cannot look these up: a block of rows or a codebook whose offsets pass 32 bits."""
    largest = max(min(BLOCK_ROWS, x.shape[0]), *(codebook.shape[0] for codebook in codebooks))
    if largest * x.shape[1] >= 2**31:
        return f"{largest} vectors of width {x.shape[1]} have offsets beyond 32 bits"
    return None


def lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"]], *, interpret: bool = False
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Does as `reference.lookup`. `interpret` runs the kernel in plain JAX, on any platform: for tests."""
    codebooks = [jnp.asarray(codebook, jnp.float32) for codebook in codebooks]
    levels = [_Level(codebook, half_norms(codebook)) for codebook in codebooks]
    return lookup_blocks(x, levels, partial(_nearest, interpret=interpret), BLOCK_ROWS)


def _nearest(x: Float32[Array, "n d"], level: _Level, *, interpret: bool) -> Int32[Array, " n"]:
    """Returns the nearest code of each row."""
    rows = x.shape[0]
    tile = _tile(ROWS, rows)
    # CPUs, where interpreted kernels run, know fp32 products but not this way to them.
    precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return pl.pallas_call(
        partial(_kernel, tile=tile, precision=precision),
        grid=(pl.cdiv(rows, tile),),
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        # Every tile of rows reads all codes; without an estimate XLA's scheduler takes the kernel for free.
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * level.codebook.shape[0],
            transcendentals=0,
            bytes_accessed=4 * (x.size + x.shape[0] + pl.cdiv(x.shape[0], tile) * level.codebook.size),
        ),
        interpret=interpret,
        name="rvq_nearest",
    )(x, level.codebook, level.half_norms)


def _tile(most: int, length: int) -> int:
    """Returns the power of two that a dim of `length` is tiled with."""
    return max(SMALLEST, min(most, pl.next_power_of_2(length)))


def _kernel(x_ref, codebook_ref, half_norms_ref, code_ref, *, tile: int, precision):
    """Compares one tile of rows with all codes. NaN is less than nothing: code 0 stays."""
    (rows, width), size = x_ref.shape, codebook_ref.shape[0]
    code_tile, width_tile = _tile(CODES, size), _tile(WIDTH, width)
    first_row = pl.program_id(0) * tile

    # Tile of codes by tile of codes: each row's least score so far and the first code that had it.
    def compare(j, best):
        least, code = best
        first_code = j * code_tile

        def add(k, products):
            a = _load(x_ref, first_row, k * width_tile, (tile, width_tile))
            b = _load(codebook_ref, first_code, k * width_tile, (code_tile, width_tile))
            return products + lax.dot_general(
                a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )

        # The width is summed tile by tile in registers.
        products = lax.fori_loop(0, pl.cdiv(width, width_tile), add, jnp.zeros((tile, code_tile), jnp.float32))
        codes = first_code + jnp.arange(code_tile)
        halves = plgpu.load(half_norms_ref.at[pl.ds(first_code, code_tile)], mask=codes < size, other=jnp.inf)
        scores = halves[None, :] - products
        tile_least = jnp.min(scores, 1)
        tile_code = jnp.min(jnp.where(scores == tile_least[:, None], codes[None, :], size), 1)
        less = tile_least < least
        return jnp.where(less, tile_least, least), jnp.where(less, tile_code, code)

    start = jnp.full(tile, jnp.inf, jnp.float32), jnp.zeros(tile, jnp.int32)
    _, code = lax.fori_loop(0, pl.cdiv(size, code_tile), compare, start)
    plgpu.store(code_ref.at[pl.ds(first_row, tile)], code, mask=first_row + jnp.arange(tile) < rows)


def _load(ref: Any, row: Array | int, column: Array | int, shape: tuple[int, int]) -> Array:
    """Returns a tile of a matrix, zeros where it reaches beyond."""
    rows, columns = row + jnp.arange(shape[0]), column + jnp.arange(shape[1])
    inside = (rows < ref.shape[0])[:, None] & (columns < ref.shape[1])[None, :]
    return plgpu.load(ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])], mask=inside, other=0.0)
