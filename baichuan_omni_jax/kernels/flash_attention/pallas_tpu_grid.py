"""How the TPU kernels walk over the pairs of blocks that a plan lists: the grid, its steps, and what they cost."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from baichuan_omni_jax.kernels.flash_attention.plan import FIRST, INTERIOR, LAST, expected_pairs, unpack

Side = Literal["query", "key"]


class Static(NamedTuple):
    """Holds what the kernels are built for: `kv_heads` key heads a grid step, each with its `group` of query heads."""

    causal: bool
    scale: float
    block_q: int
    block_kv: int
    kv_heads: int
    group: int
    vmem_bytes: int
    interpret: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


class Visits(NamedTuple):
    """Holds pairs in the order of their visit (b * N,), and per row how many are real and how many steps (b,).

    The steps after the real pairs only write the blocks that no pair visits.
    """

    pairs: Array
    real: Array
    steps: Array

    @classmethod
    def from_pairs(cls, pairs: Array, count: Array) -> "Visits":
        """Takes them from a plan's list (b, N) and count (b,)."""
        unvisited = (jnp.arange(pairs.shape[1]) >= count[:, None]) & (pairs & FIRST > 0)
        return cls(pairs.reshape(-1), count, count + unvisited.sum(1, dtype=jnp.int32))

    def bounds(self, cores: int) -> Array:
        """Returns where each core's steps of a row begin and end, (b, cores + 1), for one core or two.

        The second one begins with the block whose first pair is nearest to the middle: no block is two cores' own.
        """
        ends = [jnp.zeros_like(self.steps), self.steps]
        if cores == 2:
            place = jnp.arange(self.pairs.shape[0] // len(self.steps))
            begins = (self.pairs.reshape(len(self.steps), -1) & FIRST > 0) & (place > 0) & (place < self.steps[:, None])
            distance = jnp.where(begins, jnp.abs(2 * place - self.real[:, None]), jnp.iinfo(jnp.int32).max)
            ends.insert(1, jnp.argmin(distance, 1).astype(jnp.int32))
        return jnp.stack(ends, 1)


def visit_pairs(
    kernel: Callable,
    static: Static,
    visits: Visits,
    *,
    queries: Sequence[Array],
    keys: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
    side: Side,
    scratch: Sequence[Any],
    products: int,
) -> tuple[Array, ...]:
    """Runs `kernel` over (rows, groups of heads, cores, steps); arrays are blocked along their last axis, the tokens.

    Args:
        kernel: called with the pairs, the queries' blocks, the keys' blocks, the results' blocks, the scratch.
        static: sizes.
        visits: which pair of blocks each step sees.
        queries: arrays blocked by queries.
        keys: arrays blocked by keys.
        out: shapes of the results.
        side: whose blocks the results have; pairs are in the order of that side.
        scratch: what a core keeps between the steps of a block.
        products: matrix products of a pair and head, for the estimate of what the kernel costs.
    """
    rows, groups = queries[0].shape[:2]
    length = visits.pairs.shape[0] // rows
    block = static.block_q if side == "query" else static.block_kv
    # One row and one group of heads would leave the second core of a chip idle: its steps are shared out instead.
    cores = 2 if rows * groups == 1 and out[0].shape[-1] > block else 1
    bounds = visits.bounds(cores)

    # Which block of an array a grid step sees: read off the plan's pair, which scalar memory holds ahead of time.
    def spec(array: Any, side: Side) -> pl.BlockSpec:
        by_group = array.ndim > 3  # Else it is tokens, which all heads share.

        def index(row, group, core, step, pairs, count, bounds):
            # Steps beyond a core's own stay on its last block, which is then neither fetched nor written again.
            place, _ = _place(row, core, step, bounds, cores)
            query, key, _ = unpack(pairs[row * length + place])
            middle = (group, *[0] * (array.ndim - 3)) if by_group else (0,)
            return (row, *middle, query if side == "query" else key)

        inner = array.shape[2 if by_group else 1 : -1]
        block = static.block_q if side == "query" else static.block_kv
        return pl.BlockSpec((None, *([None] if by_group else []), *inner, block), index)

    run = pl.pallas_call(
        functools.partial(kernel, static=static, length=length, cores=cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, groups, cores, (bounds[:, 1:] - bounds[:, :-1]).max()),
            in_specs=[*(spec(x, "query") for x in queries), *(spec(x, "key") for x in keys)],
            out_specs=[spec(x, side) for x in out],
            scratch_shapes=scratch,
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem_bytes,
        ),
        cost_estimate=_cost(static, products, queries, keys, out, length),
        interpret=static.interpret,
        name=kernel.__name__.strip("_"),
    )
    return tuple(run(visits.pairs, visits.real, bounds.reshape(-1), *queries, *keys))


def _place(row: Any, core: Any, step: Any, bounds: Any, cores: int) -> tuple[Array, Array]:
    """Returns which pair of a row a core is at in a step, and whether the step is one of its own."""
    first, end = bounds[row * (cores + 1) + core], bounds[row * (cores + 1) + core + 1]
    return jnp.minimum(first + step, end - 1), first + step < end


def _cost(
    static: Static, products: int, queries: Sequence[Array], keys: Sequence[Array], out: Sequence[Any], length: int
) -> pl.CostEstimate:
    """Estimates FLOPs, exponentials and bytes of a kernel, so that XLA's scheduler does not take it for free."""
    rows, groups, _, width, tokens = queries[0].shape
    blocks_q = -(-tokens // static.block_q)
    blocks_kv = length // blocks_q
    pairs = rows * groups * expected_pairs(blocks_q, blocks_kv, static.block_kv, static.causal)
    scores = pairs * static.heads * static.block_q * static.block_kv
    # Blocks of the keys' side come with every pair, those of the queries once a block (dk, dv: the other way round).
    size = lambda arrays: sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)  # noqa: E731
    by_pair = size(keys) * pairs / (rows * groups * blocks_kv)
    return pl.CostEstimate(
        flops=int(2 * products * scores * width),
        transcendentals=int(scores),
        bytes_accessed=int(by_pair + size(queries) + size(out)),
    )


class Step:
    """Says what this grid step has to do."""

    def __init__(self, pairs, count, bounds, length: int, cores: int):
        # Rows have different numbers of pairs, the grid one number of steps: those past a row's own do nothing.
        row, core, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        place, mine = _place(row, core, step, bounds, cores)
        flags, real = pairs[row * length + place], mine & (place < count[row])
        self.first = mine & (flags & FIRST > 0)
        self.last = mine & (flags & LAST > 0)
        self.interior = real & (flags & INTERIOR > 0)
        self.edge = real & (flags & INTERIOR == 0)

    def run(self, start: Callable, visit: Callable, finish: Callable) -> None:
        """Calls `start` at a block's first pair, `visit(masked)` at every real one, `finish` at its last."""
        pl.when(self.first)(start)
        pl.when(self.interior)(lambda: visit(False))
        pl.when(self.edge)(lambda: visit(True))
        pl.when(self.last)(finish)
