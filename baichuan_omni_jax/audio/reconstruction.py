"""How far a decoded mel is from the clip's own: L1 + L2 of coarse and refined mel, at every scale of the targets."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from baichuan_omni_jax.audio.decoder import DecodedAudio
from baichuan_omni_jax.nn.lengths import frames_before, keep, resize_nearest


class MelTarget(NamedTuple):
    """A clip's mel at one hop and window: (m, s, mels), of which `lengths` (m,) are valid."""

    mel: Float[Array, "m s mels"]
    lengths: Int32[Array, " m"]


def reconstruction_loss(
    decoded: DecodedAudio, targets: Sequence[MelTarget]
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The sum of L1 + L2 over coarse and refined mel and over the scales; and numbers for the report.

    The decoded mel is stretched (nearest) to each target's own length. Means go over valid frames and mels.
    Numbers: `mel_mae_coarse`, `mel_mae` (refined), at the first scale.
    """
    total, numbers = jnp.zeros((), jnp.float32), {}
    with jax.named_scope("reconstruction_loss"):
        for scale, target in enumerate(targets):
            for name, mel in (("mel_mae_coarse", decoded.coarse_mel), ("mel_mae", decoded.refined_mel)):
                l1, l2 = mel_errors(mel, decoded.mel_lengths, target)
                total = total + l1 + l2
                if scale == 0:
                    numbers[name] = l1
    return total, numbers


def mel_errors(
    mel: Float[Array, "m t mels"], lengths: Int32[Array, " m"], target: MelTarget
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Mean absolute and mean squared error of `mel`, stretched to the target. Clips without a frame do not count."""
    absolute, squared, count = mel_error_sums(mel, lengths, target)
    return absolute / jnp.maximum(count, 1.0), squared / jnp.maximum(count, 1.0)


def mel_error_sums(
    mel: Float[Array, "m t mels"], lengths: Int32[Array, " m"], target: MelTarget
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, ""]]:
    """Sums of absolute and squared errors as in `mel_errors`, and how many values they are of."""
    stretched = resize_nearest(mel.astype(jnp.float32), lengths, target.lengths, target.mel.shape[1])
    counted = jnp.where(lengths > 0, target.lengths, 0)
    error = keep(stretched - target.mel.astype(jnp.float32), counted)
    count = frames_before(counted, target.mel.shape[1]).sum(dtype=jnp.float32) * target.mel.shape[-1]
    return jnp.abs(error).sum(), (error**2).sum(), count
