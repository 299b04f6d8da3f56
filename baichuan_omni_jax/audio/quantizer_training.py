"""Training of the residual quantizer: codes that move with the data, gradients that pass straight through.

The released checkpoint holds what this makes (`embed`, `embed_avg`, `cluster_size`); the recipe is that of
arXiv:2502.17239, section 3.1: straight-through gradients, moving averages that shrink, codes placed anew when unused,
Gumbel noise on distances, and a growing share of clips that see quantized features.
Nothing is mutated: codebooks come in as arguments and go out as results.

Of each codebook: running means of the vectors that chose each code, and a new place for unused codes. Sums go over the
valid vectors of the global batch, so a codebook is the same on any mesh, and a code that any device uses counts as
used. A codebook that nothing was quantized with yet is seeded with vectors of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.config.audio import QuantizerConfig
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as

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


class Quantized(NamedTuple):
    """Holds what a training step makes of features (m, g, d).

    `features`: quantized where the clip sees that, with the gradient of the features that came in. `commitment`: the
    mean over valid frames and width of (features - sum of codes)^2, whose gradient moves the features only.
    `residuals` (levels,): the same mean after each level. `states` are the codebooks after the step.
    """

    features: Float[Array, "m g d"]
    commitment: Float32[Array, ""]
    residuals: Float32[Array, " q"]
    codes: Int32[Array, "m g q"]
    states: tuple[CodebookState, ...]


def quantize_in_training(
    key: PRNGKeyArray,
    features: Float[Array, "m g d"],
    valid: Bool[Array, "m g"],
    states: Sequence[CodebookState],
    step: Int32[Array, ""],
    config: QuantizerConfig,
    compute: ComputePolicy,
) -> Quantized:
    """Quantizes clips in a training step, and moves the codebooks.

    Args:
        key: of everything random in this step; the same on any mesh.
        features: the bridge's output (m, g, d), clips split over the batch axes.
        valid: which frames count (m, g); the others count for nothing.
        states: the codebooks, level by level.
        step: the number of this step, which the schedules read.
        config: schedules and shares.
        compute: which mesh axes split the clips.

    Returns:
        The features to decode, the commitment, and the codebooks after the step.
    """
    with jax.named_scope("quantize_in_training"):
        x = split_as(jax.lax.stop_gradient(features).astype(jnp.float32), compute, CLIPS)
        valid = split_as(valid, compute, CLIPS)
        keys = jax.random.split(key, len(states) + 2)
        pool = draw_pool(keys[-2], valid)
        kept = kept_levels(keys[-1], x.shape[0], len(states), step, config)
        starts = level_starts([state.embed.shape[0] for state in states])
        # Level by level: the nearest codes of what is left, and the codebook after this batch.
        residual, seen, total, codes, left, moved = x, 0.0, 0.0, [], [], []
        for level, (level_key, state) in enumerate(zip(keys, states, strict=False)):
            own = pool._replace(start=jnp.int32(starts[level]))
            code, chosen, state = _level(level_key, own, residual, valid, state, step, config, compute)
            total = total + chosen
            seen = seen + jnp.where(kept[:, level, None, None], chosen, 0.0)
            residual = residual - chosen
            codes.append(jnp.where(valid, code, 0))
            left.append(_mean(residual**2, valid))
            moved.append(state)
        # Clips that see no level keep their features: the decoder learns before the codes are good.
        seen = jnp.where(kept[:, :1, None], seen, x)
        commitment = _mean((features.astype(jnp.float32) - total) ** 2, valid)
        # Straight through: the value of the codes, the gradient of the features.
        out = features + jax.lax.stop_gradient(seen.astype(features.dtype) - features)
    return Quantized(out, commitment, jnp.stack(left), jnp.stack(codes, -1), tuple(moved))


def kept_levels(
    key: PRNGKeyArray, clips: int, levels: int, step: Int32[Array, ""], config: QuantizerConfig
) -> Bool[Array, "m q"]:
    """Draws which levels each clip sees: none (its features as they were), all, or the first few."""
    sees, cut, count = jax.random.split(key, 3)
    # A share of clips sees the first few levels alone, so that those carry what matters.
    some = jnp.where(
        jax.random.uniform(cut, (clips,)) < config.level_dropout,
        jax.random.randint(count, (clips,), 1, levels + 1),
        levels,
    )
    count = jnp.where(jax.random.uniform(sees, (clips,)) < quantized_share(config, step), some, 0)
    return jnp.arange(levels) < count[:, None]


def level_starts(sizes: Sequence[int]) -> list[int]:
    """Returns the number in the pool of each level's first vector: levels never share one, while there are enough.

    Where a level has a code, nothing is left over: a code of the next one at that frame would be 0, as would all others
    placed so. 64, 48 and 32 codes begin at 0, 64 and 112.
    """
    return [sum(sizes[:level]) for level in range(len(sizes))]


def averaging(config: QuantizerConfig, step: Int32[Array, ""]) -> Averaging:
    """Returns how codebooks move in this step: in the first ones as k-means does, which shrinks nothing."""
    first = step < config.init_steps
    # A decay of step / (step + 1) makes the running mean a plain mean over the first steps.
    mean = step.astype(jnp.float32) / (step + 1)
    restart = jnp.where(first & (config.restart_after > 0), 1, config.restart_after)
    return Averaging(jnp.where(first, mean, config.decay), jnp.where(first, 0.0, config.shrink), restart)


def temperature(config: QuantizerConfig, step: Int32[Array, ""]) -> Float[Array, ""]:
    """Returns the scale of the noise on distances in this step."""
    start, end = config.temperature
    return start + (end - start) * _progress(step, config.temperature_steps)


def quantized_share(config: QuantizerConfig, step: Int32[Array, ""]) -> Float[Array, ""]:
    """Returns the share of clips that see quantized features in this step."""
    return config.quantized_share + (1.0 - config.quantized_share) * _progress(step, config.quantized_steps)


def commitment_weight(first: float, last: float, config: QuantizerConfig, step: Int32[Array, ""]) -> Float[Array, ""]:
    """Returns the weight of the commitment in this step: from `first` to `last` while the quantized share grows."""
    return first + (last - first) * _progress(step, config.quantized_steps)


def _level(
    key: PRNGKeyArray,
    pool: Pool,
    residual: Array,
    valid: Array,
    state: CodebookState,
    step: Array,
    config: QuantizerConfig,
    compute: ComputePolicy,
) -> tuple[Array, Array, CodebookState]:
    """Returns codes (m, g), the chosen vectors, and the level's codebook after the step."""
    if config.init_steps:
        # A first batch without a vector has nothing to seed with.
        first = (step == 0) & (pool.valid_count > 0)
        state = jax.lax.cond(first, lambda: seed(pool, residual, state, compute), lambda: state)
    # Gumbel noise on the distances samples codes near the nearest one; it scales with what the level has to quantize.
    # Half the squared distances to all codes, less |x|^2 / 2, which is the same for each.
    products = jnp.einsum("mgd,kd->mgk", residual, state.embed, precision=jax.lax.Precision.HIGHEST)
    scores = 0.5 * jnp.sum(state.embed * state.embed, -1) - products
    if max(config.temperature) > 0:
        scale = temperature(config, step) * 0.5 * _mean(residual**2, valid) * residual.shape[-1]
        scores = scores - scale * _gumbel(key, scores)
    code = jnp.argmin(scores, -1).astype(jnp.int32)
    spec = compute.rules.spec(CLIPS, None, None)
    chosen = state.embed.at[code].get(out_sharding=spec)
    moved = move(pool, residual, valid, code, state, averaging(config, step), compute)
    # Every code may be placed anew in the steps of k-means: counting begins after them.
    return code, chosen, moved._replace(unused=jnp.where(step < config.init_steps, 0, moved.unused))


def _gumbel(key: PRNGKeyArray, like: Float32[Array, "m g k"]) -> Float32[Array, "m g k"]:
    """Draws noise clip by clip: the same on any mesh, and only a device's own clips on it."""
    spec = jax.typeof(like).sharding.spec
    clips = jax.sharding.reshard(jnp.arange(like.shape[0]), jax.sharding.PartitionSpec(spec[0]))
    return jax.vmap(lambda clip: jax.random.gumbel(jax.random.fold_in(key, clip), like.shape[1:]))(clips)


def _mean(x: Float32[Array, "m g d"], valid: Bool[Array, "m g"]) -> Float32[Array, ""]:
    """Returns the mean over valid frames and the width; 0 where nothing is valid."""
    return jnp.where(valid[..., None], x, 0.0).sum() / jnp.maximum(valid.sum() * x.shape[-1], 1)


def _progress(step: Int32[Array, ""], steps: int) -> Float[Array, ""]:
    """Returns how far a schedule of `steps` is, from 0 to 1."""
    return jnp.clip(step.astype(jnp.float32) / max(steps, 1), 0.0, 1.0)
