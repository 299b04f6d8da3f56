"""How far a decoded mel is from the clip's own: L1 + L2 of coarse and refined mel, at every scale of the targets.

Both are compared at the same moments. Codes cover a little less than their clip: frames of the target that begin when
the decoded mel has ended do not count.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from baichuan_omni_jax.audio.decoder import DecodedAudio
from baichuan_omni_jax.nn.lengths import frames_before, keep

SAME_RATE = Fraction(1)


class MelTarget(NamedTuple):
    """A clip's mel at one hop and window: (m, s, mels), of which `lengths` (m,) are valid."""

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
    there = mel.astype(jnp.float32).at[:, same_moments(frames, ratio)]
    there = there.get(mode="clip", out_sharding=jax.typeof(target.mel).sharding.spec)
    counted = jnp.minimum(frames_covered(lengths, ratio), target.lengths)
    error = keep(there - target.mel.astype(jnp.float32), counted)
    count = frames_before(counted, frames).sum(dtype=jnp.float32) * target.mel.shape[-1]
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
