"""Training of one codebook: running means of the vectors that chose each code, and a new place for unused codes.

Sums go over the valid vectors of the global batch, so a codebook is the same on any mesh, and a code that any device
uses counts as used. A codebook that nothing was quantized with yet is seeded with vectors of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy

SMOOTHING = 1e-5  # Laplace: counts a code has before anything chose it


class CodebookState(NamedTuple):
    """Holds a codebook in training, whole on every device: `embed` (k, d) is what vectors are compared with.

    `embed_avg` and `cluster_size` are the running sum and count of the vectors that chose each code; `unused` counts
    the steps since the last one did, whether the code was placed anew meanwhile or not.
    """

    embed: Float32[Array, "k d"]
    embed_avg: Float32[Array, "k d"]
    cluster_size: Float32[Array, " k"]
    unused: Int32[Array, " k"]


class Averaging(NamedTuple):
    """Says how a codebook moves in one step. Numbers or scalars.

    Attributes:
        decay: what stays of the running means.
        shrink: the share of themselves that these lose.
        restart_after: unused steps after which a code is placed anew, and again after as many more (0: never).
    """

    decay: Float[Array, ""] | float
    shrink: Float[Array, ""] | float
    restart_after: Int32[Array, ""] | int


class Pool(NamedTuple):
    """Holds the order in which vectors of the global batch are taken to place codes at.

    `places` (n,), (clip, frame) counted as one, are of all vectors in random order, the `valid_count` valid ones first.
    The first code gets number `start` of these, the next one the next.
    """

    places: Int32[Array, " n"]
    valid_count: Int32[Array, ""]
    start: Int32[Array, ""]


def draw_pool(key: PRNGKeyArray, valid: Bool[Array, "m g"]) -> Pool:
    """Draws a new order. One serves all levels of a step, as a sort takes a TPU's compiler half a minute."""
    real = jax.sharding.reshard(valid, P(None, None)).reshape(-1)
    # Valid vectors get numbers below 1, the others 2: sorted, the valid ones come first, in random order.
    places = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2.0)).astype(jnp.int32)
    return Pool(places, real.sum(dtype=jnp.int32), jnp.int32(0))


def squared_distances(x: Float32[Array, "m g d"], embed: Float32[Array, "k d"]) -> Float32[Array, "m g k"]:
    """Returns half the squared distances to all codes, less |x|^2 / 2, which is the same for each."""
    products = jnp.einsum("mgd,kd->mgk", x, embed, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(embed * embed, -1) - products


def seed(pool: Pool, x: Float32[Array, "m g d"], state: CodebookState, compute: ComputePolicy) -> CodebookState:
    """Places every code at a vector of the batch, each as often as any other."""
    embed = _draw(pool, x, jnp.arange(state.embed.shape[0]), compute)
    return CodebookState(embed, embed, jnp.ones_like(state.cluster_size), jnp.zeros_like(state.unused))


def move(
    pool: Pool,
    x: Float32[Array, "m g d"],
    valid: Bool[Array, "m g"],
    codes: Int32[Array, "m g"],
    state: CodebookState,
    averaging: Averaging,
    compute: ComputePolicy,
) -> CodebookState:
    """Returns the codebook after a batch in which the vectors `x` chose `codes`.

    With decay a, shrink b, count c and sum s of a code's vectors: cluster_size = a cluster_size + (1 - a) c,
    embed_avg = (1 - b) (a embed_avg + (1 - a) s), embed = embed_avg / cluster_size, the sizes smoothed by `SMOOTHING`.
    So the shrink compounds, as the next mean builds on the shrunk one (arXiv:2502.17239, section 3.1): a code whose
    vectors have the mean m comes to rest at m (1 - b) (1 - a) / (1 - (1 - b) a), which is 0.50 m for a 0.99, b 0.01.
    A code unused for `restart_after` steps becomes a vector of the batch, its size 1. Without a valid vector nothing
    changes.
    """
    size = state.embed.shape[0]
    # Running means over the global batch: sums of all devices, so that every mesh moves a codebook alike.
    counts, sums = _sums(x, valid, codes, size, compute)
    decay = averaging.decay
    cluster_size = decay * state.cluster_size + (1 - decay) * counts
    embed_avg = (1 - averaging.shrink) * (decay * state.embed_avg + (1 - decay) * sums)
    # Laplace smoothing keeps the division away from codes that hardly anything chose.
    total = cluster_size.sum()
    smoothed = (cluster_size + SMOOTHING) * total / (total + size * SMOOTHING)
    # A code that nothing ever chose stays where it is: its running sum has nothing to say.
    known = (cluster_size > SMOOTHING)[:, None]
    embed = jnp.where(known, embed_avg / jnp.maximum(smoothed, 1e-30)[:, None], state.embed)
    moved = CodebookState(embed, embed_avg, cluster_size, jnp.where(counts > 0, 0, state.unused + 1))
    moved = _restart(pool, x, moved, averaging.restart_after, compute)
    return jax.tree.map(lambda new, old: jnp.where(jnp.any(valid), new, old), moved, state)


def usage(state: CodebookState, window: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the share of codes used in the last `window` steps, and the running counts' perplexity (at most k)."""
    share = state.cluster_size / jnp.maximum(state.cluster_size.sum(), 1e-30)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    return jnp.mean(state.unused < window, dtype=jnp.float32), jnp.exp(entropy)


def _restart(pool: Pool, x: Array, state: CodebookState, after: Array | int, compute: ComputePolicy) -> CodebookState:
    """Places codes that were unused for `after` steps, or a multiple of them, at vectors of the batch."""
    dead = (state.unused > 0) & (state.unused % jnp.maximum(after, 1) == 0) & (jnp.asarray(after) > 0)

    # Only in the rare step that needs it: the branch gathers vectors from all devices.
    def place() -> CodebookState:
        # Numbered among the dead, so that they take different vectors while there are enough.
        fresh = _draw(pool, x, jnp.cumsum(dead) - 1, compute)
        return CodebookState(
            jnp.where(dead[:, None], fresh, state.embed),
            jnp.where(dead[:, None], fresh, state.embed_avg),
            jnp.where(dead, 1.0, state.cluster_size),
            state.unused,
        )

    return jax.lax.cond(jnp.any(dead), place, lambda: state)


def _draw(pool: Pool, x: Array, numbers: Int32[Array, " k"], compute: ComputePolicy) -> Float32[Array, "k d"]:
    """Returns a vector of the pool for each of `numbers`: of equal ones the same, else another until all are taken."""
    numbers = pool.start + jnp.maximum(numbers, 0)
    return _rows(x, pool.places[numbers % jnp.maximum(pool.valid_count, 1)], compute)


def _sums(
    x: Array, valid: Array, codes: Array, size: int, compute: ComputePolicy
) -> tuple[Float32[Array, " k"], Float32[Array, "k d"]]:
    """Returns how many vectors of the global batch chose each code, and their sum."""

    def local(x: Array, valid: Array, codes: Array) -> tuple[Array, Array]:
        codes = jnp.where(valid, codes, size).reshape(-1)  # beyond the last: dropped
        counts = jnp.zeros(size).at[codes].add(1.0, mode="drop")
        sums = jnp.zeros((size, x.shape[-1])).at[codes].add(x.reshape(-1, x.shape[-1]), mode="drop")
        return jax.lax.psum((counts, sums), compute.rules.axes(CLIPS))

    clips = [compute.rules.spec(CLIPS, *[None] * (array.ndim - 1)) for array in (x, valid, codes)]
    return _by_shard(local, (x, valid, codes), clips, (P(None), P(None, None)))


def _rows(x: Array, places: Int32[Array, " k"], compute: ComputePolicy) -> Float32[Array, "k d"]:
    """Returns vectors of the global batch by their place in it, (clip, frame) counted as one."""

    # Each device fills in the rows that it holds and zeros for the others: the sum over devices is all rows.
    def local(x: Array, places: Array) -> Array:
        mine = places - jax.lax.axis_index(compute.rules.axes(CLIPS)) * (x.shape[0] * x.shape[1])
        rows = x.reshape(-1, x.shape[-1]).at[mine].get(mode="fill", fill_value=0.0)
        rows = jnp.where((mine >= 0)[:, None], rows, 0.0)
        return jax.lax.psum(rows, compute.rules.axes(CLIPS))

    in_specs = compute.rules.spec(CLIPS, None, None), P(None)
    return _by_shard(local, (x, places), in_specs, P(None, None))


def _by_shard(function: Callable[..., Any], arrays: Sequence[Array], in_specs: Sequence[P], out_specs: Any) -> Any:
    """Applies `function`, which sums over the mesh itself, to each device's part of the arrays."""
    mesh, parts = jax.typeof(arrays[0]).sharding.mesh, map(jax.sharding.reshard, arrays, in_specs)
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)(*parts)
