"""Training on mels: what is masked of the input, and how far the decoded mel is from the clip's own.

SpecAugment (arXiv:1904.08779) as the released processor has it: spans of frames and bands of mels become 0.
Reconstruction (arXiv:2502.17239): L1 + L2 of coarse and refined mel, at every scale of the targets, compared at the
same moments. Codes cover a little less than their clip: frames of the target that begin when the decoded mel has ended
do not count.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.decoder import DecodedAudio
from baichuan_omni_jax.config.audio import SpecAugmentConfig
from baichuan_omni_jax.nn.layers import length_mask, mask_padding
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as
from baichuan_omni_jax.sharding import placement


def spec_augment(
    key: PRNGKeyArray,
    mel: Float[Array, "c f mels"],
    lengths: Int32[Array, " c"],
    config: SpecAugmentConfig,
    compute: ComputePolicy,
) -> Float[Array, "c f mels"]:
    """Masks Whisper's log mel: spans and bands become 0, in the first `lengths` frames of each clip.

    What is masked depends on the key and the clip's place in the global batch alone: the same on any mesh. A clip of
    fewer frames than its least number of spans has, plus one, stays as it is.
    """
    if not config.mask_time_prob and not config.mask_feature_prob:
        return mel
    size, bands = mel.shape[1:]

    def clip_mask(clip: Array, length: Array) -> Array:
        for_time, for_bands = jax.random.split(jax.random.fold_in(key, clip))
        times = masked_places(
            for_time, size, length, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
        )
        mels = masked_places(
            for_bands, bands, bands, config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks
        )
        masked = (times[:, None] | mels) & (jnp.arange(size) < length)[:, None]
        # Only a clip with room for the least number of spans and bands is masked at all.
        return masked & (
            (length > config.mask_time_length * config.mask_time_min_masks)
            & (bands > config.mask_feature_length * config.mask_feature_min_masks)
        )

    with jax.named_scope("spec_augment"):
        # A key of each clip's own, by its number in the global batch.
        clips, lengths = (split_as(x, compute, CLIPS) for x in (jnp.arange(mel.shape[0]), lengths))
        return jnp.where(jax.vmap(clip_mask)(clips, lengths), 0, split_as(mel, compute, CLIPS))


def masked_places(
    key: PRNGKeyArray, size: int, length: Int[Array, ""] | int, share: float, span: int, least: int
) -> Bool[Array, " size"]:
    """Draws which of `size` places are masked, of which the first `length` count; none with a `share` of 0.

    max(least, floor(share x length / span + u)) spans, u even in [0, 1), begin at different places before
    length - span (all of them where there are fewer).
    """
    places = jnp.arange(size)
    if not share:
        return jnp.zeros(size, bool)
    for_count, for_order = jax.random.split(key)
    count = jnp.maximum(jnp.floor(share * length / span + jax.random.uniform(for_count)), least)
    # The `count` allowed places with the least random numbers begin a span: different ones, however many there are.
    allowed = places < length - span
    drawn = jnp.where(allowed, jax.random.uniform(for_order, (size,)), 2.0)
    begins = allowed & (jnp.argsort(jnp.argsort(drawn)) < count)
    # A place is masked while more spans have begun than had `span` places earlier.
    begun = jnp.cumsum(begins)
    return begun > jnp.pad(begun, (span, 0))[:size]


SAME_RATE = Fraction(1)


class MelTarget(NamedTuple):
    """Holds clips' mels at one hop and window: (m, s, mels), of which `lengths` (m,) are valid."""

    mel: Float[Array, "m s mels"]
    lengths: Int32[Array, " m"]


def reconstruction_loss(
    decoded: DecodedAudio, targets: Sequence[MelTarget], ratios: Sequence[Fraction]
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Sums L1 + L2 over coarse and refined mel and over the scales; also returns numbers for the report.

    `ratios`: decoded frames for each frame of the target, scale by scale (see `same_moments`). Means go over the frames
    and mels that both have. Numbers: `mel_mae_coarse`, `mel_mae` (refined), at the first scale.
    """
    total, numbers = jnp.zeros((), jnp.float32), {}
    with jax.named_scope("reconstruction_loss"):
        # Coarse mel too, so that the decoder proper learns and the post-net only refines.
        for scale, (target, ratio) in enumerate(zip(targets, ratios, strict=True)):
            for name, mel in (("mel_mae_coarse", decoded.coarse_mel), ("mel_mae", decoded.refined_mel)):
                l1, l2 = mel_errors(mel, decoded.mel_lengths, target, ratio)
                total = total + l1 + l2
                if scale == 0:
                    numbers[name] = l1
    return total, numbers


def mel_errors(
    mel: Float[Array, "m t mels"], lengths: Int32[Array, " m"], target: MelTarget, ratio: Fraction = SAME_RATE
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns mean absolute and mean squared error of `mel` at the target's moments; 0 where nothing is compared."""
    absolute, squared, count = mel_error_sums(mel, lengths, target, ratio)
    return absolute / jnp.maximum(count, 1.0), squared / jnp.maximum(count, 1.0)


def mel_error_sums(
    mel: Float[Array, "m t mels"], lengths: Int32[Array, " m"], target: MelTarget, ratio: Fraction = SAME_RATE
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, ""]]:
    """Returns sums of absolute and squared errors as in `mel_errors`, and how many values they are of."""
    frames = target.mel.shape[1]
    # The decoded frame at the moment of each target frame; those past its end are clipped, and not counted below.
    there = mel.astype(jnp.float32).at[:, same_moments(frames, ratio)]
    there = there.get(mode="clip", out_sharding=placement(jax.typeof(target.mel).sharding.spec))
    counted = jnp.minimum(frames_covered(lengths, ratio), target.lengths)
    error = mask_padding(there - target.mel.astype(jnp.float32), counted)
    count = length_mask(counted, frames).sum(dtype=jnp.float32) * target.mel.shape[-1]
    return jnp.abs(error).sum(), (error**2).sum(), count


def same_moments(frames: int, ratio: Fraction) -> Int[np.ndarray, " s"]:
    """Returns the decoded frame at the moment of each of a target's `frames`: floor(i x ratio).

    `ratio` is decoded rate / target rate, whatever the lengths. 62.5 Hz beside 100 Hz: 0 0 1 1 2 3 3 4 for 8 frames.
    """
    return np.arange(frames) * ratio.numerator // ratio.denominator


def frames_covered(lengths, ratio: Fraction):
    """Returns how many frames of a target have one of `lengths` decoded frames at their moment: ceil(length / ratio).

    Numbers or integer arrays. 5 frames at 62.5 Hz cover 8 at 100 Hz.
    """
    return -(-lengths * ratio.denominator // ratio.numerator)
