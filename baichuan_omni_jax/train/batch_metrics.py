"""What a packed batch holds, measured on device: counts that FLOP formulas are multiplied by, and use of budgets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.omni.batch import Batch


def count_batch(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Counts what a packed batch holds, whatever mesh it is split over: fp32 sums, good to 1e-6.

    `tokens`, `patches`, `audio_frames` are real ones, `text_targets` positions with a text loss, `audio_targets` frames
    to predict (end frames too); `causal_pairs` (query, key) pairs of tokens, `patch_pairs` pairs of patches of one
    image. Positions restart with each document, so token blocks may lie in any order; an image's patches lie together,
    on one shard. Fields of a branch that the run lacks may be missing: their counts are 0.
    """
    count = lambda condition: condition.sum(dtype=jnp.float32)  # noqa: E731
    real = batch["segment_ids"] > 0
    found = dict.fromkeys(("patches", "patch_pairs", "audio_frames", "audio_targets"), jnp.zeros(()))
    # A token at position p of its document sees p + 1 keys. int32 would overflow at one document of 65536 tokens.
    found |= {
        "tokens": count(real),
        "causal_pairs": jnp.where(real, batch["positions"] + 1, 0).sum(dtype=jnp.float32),
        "text_targets": count(batch["text_weights"] > 0),
    }
    if "patch_segments" in batch:
        found["patches"] = count(batch["patch_segments"] > 0)
        found["patch_pairs"] = _squared_runs(batch["patch_segments"])
    if "audio_index" in batch:
        found["audio_frames"] = count(batch["audio_index"] < batch["tokens"].shape[1])
    if "audio_weights" in batch:
        found["audio_targets"] = count(batch["audio_weights"][:, :, 0] > 0)
    return found


def fill_metrics(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Measures a global batch: real tokens, and the used share of each budget."""
    real = batch["segment_ids"] > 0
    mean = lambda used: jnp.mean(used, dtype=jnp.float32)  # noqa: E731
    metrics = {"tokens": real.sum(dtype=jnp.float32), "fill_tokens": mean(real)}
    if "patch_segments" in batch:
        metrics["fill_patches"] = mean(batch["patch_segments"] > 0)
    if "audio_index" in batch:
        metrics["fill_audio"] = mean(batch["audio_index"] < real.shape[1])
    return metrics


def _squared_runs(ids: Int32[Array, "b p"]) -> Float[Array, ""]:
    """Sums n^2 over runs of n equal non-zero ids; the run of a patch is read on its own shard.

    ids [1 1 1 2 0]: places in their run 0 1 2 0, so 1 + 3 + 5 + 1 = 3^2 + 1^2
    """

    def local(ids: Int32[Array, "b p"]) -> Float[Array, "b p"]:
        place = jnp.arange(ids.shape[1])
        starts = jnp.where(ids != jnp.roll(ids, 1, 1), place, 0)
        in_run = place - jax.lax.cummax(starts, axis=1)
        return jnp.where(ids > 0, 2 * in_run + 1, 0).astype(jnp.float32)

    sharding = jax.typeof(ids).sharding
    if not sharding.mesh.empty:
        # No run crosses a shard, so each counts its own and nothing is exchanged but the sum.
        local = jax.shard_map(local, mesh=sharding.mesh, in_specs=(sharding.spec,), out_specs=sharding.spec)
    return local(ids).sum()
