"""SpecAugment (arXiv:1904.08779) as the released processor has it: spans of frames and bands of mels become 0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from baichuan_omni_jax.config.audio import SpecAugmentConfig
from baichuan_omni_jax.nn.param import ComputePolicy, split_as

CLIPS = "batch"


def spec_augment(
    key: PRNGKeyArray,
    mel: Float[Array, "c f mels"],
    lengths: Int32[Array, " c"],
    config: SpecAugmentConfig,
    compute: ComputePolicy,
) -> Float[Array, "c f mels"]:
    """Whisper's log mel with what `config` masks at 0, in the first `lengths` frames of each clip.

    What is masked depends on the key and the clip's place in the global batch alone: the same on any mesh. A clip of
    fewer frames than its least number of spans has, plus one, stays as it is.
    """
    if not config.mask_time_prob and not config.mask_feature_prob:
        return mel
    size, bands = mel.shape[1:]

    def of_clip(clip, length):
        for_time, for_bands = jax.random.split(jax.random.fold_in(key, clip))
        times = masked_places(
            for_time, size, length, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
        )
        mels = masked_places(
            for_bands, bands, bands, config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks
        )
        return (times[:, None] | mels) & (jnp.arange(size) < length)[:, None] & _is_long(length, bands, config)

    with jax.named_scope("spec_augment"):
        clips, lengths = (split_as(x, compute, CLIPS) for x in (jnp.arange(mel.shape[0]), lengths))
        return jnp.where(jax.vmap(of_clip)(clips, lengths), 0, split_as(mel, compute, CLIPS))


def masked_places(
    key: PRNGKeyArray, size: int, length: Int[Array, ""] | int, share: float, span: int, least: int
) -> Bool[Array, " size"]:
    """Which of `size` places are masked, of which the first `length` count; none with a `share` of 0.

    max(least, floor(share x length / span + u)) spans, u even in [0, 1), begin at different places before
    length - span (all of them where there are fewer).
    """
    places = jnp.arange(size)
    if not share:
        return jnp.zeros(size, bool)
    for_count, for_order = jax.random.split(key)
    count = jnp.maximum(jnp.floor(share * length / span + jax.random.uniform(for_count)), least)
    allowed = places < length - span
    drawn = jnp.where(allowed, jax.random.uniform(for_order, (size,)), 2.0)
    begins = allowed & (jnp.argsort(jnp.argsort(drawn)) < count)
    begun = jnp.cumsum(begins)
    return begun > jnp.pad(begun, (span, 0))[:size]


def _is_long(length: Int[Array, ""], bands: int, config: SpecAugmentConfig) -> Bool[Array, ""]:
    """Whether a clip has room for the least number of spans and bands."""
    return (length > config.mask_time_length * config.mask_time_min_masks) & (
        bands > config.mask_feature_length * config.mask_feature_min_masks
    )
