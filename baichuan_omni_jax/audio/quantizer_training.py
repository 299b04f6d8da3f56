"""Training of the residual quantizer: codes that move with the data, gradients that pass straight through.

The released checkpoint holds what this makes (`embed`, `embed_avg`, `cluster_size`); the recipe is that of
arXiv:2502.17239, section 3.1: straight-through gradients, moving averages that shrink, codes placed anew when unused,
Gumbel noise on distances, and a growing share of clips that see quantized features.
Nothing is mutated: codebooks come in as arguments and go out as results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.codebook_training import (
    Averaging,
    CodebookState,
    Pool,
    draw_pool,
    move,
    seed,
    squared_distances,
)
from baichuan_omni_jax.config.audio import QuantizerConfig
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as


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
    scores = squared_distances(residual, state.embed)
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
