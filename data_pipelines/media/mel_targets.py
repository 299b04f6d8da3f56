"""Mels that decoders learn to make: natural logs of magnitudes, at any rate, window and hop (MODEL.md section 7)."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float32

from baichuan_omni_jax.config.mel_targets import HIGHEST, MelTargetSpec

_POWER_FLOOR = 1e-9  # under the root


def mel_target(
    samples: Float32[np.ndarray, "t"], settings: MelTargetSpec, start: int = 0, length: int | None = None
) -> Float32[np.ndarray, "s mels"]:
    """The mel of a clip at the settings' rate, or of the `length` samples from `start` on: `settings.frames` of them.

    Periodic Hann, not centred: half of n_fft - hop samples are reflected at both ends of the clip. Part of a clip has
    the frames that the whole has there, as it is heard with what lies around it. A clip too short to be reflected is
    padded with zeros first.
    """
    pad, left = (settings.n_fft - settings.hop) // 2, len(samples) - start
    frames = settings.frames(max(0, left if length is None else min(length, left)))
    if not frames:
        return np.zeros((0, settings.mels), np.float32)
    whole = np.pad(samples, (0, max(0, pad + 1 - len(samples))))
    padded = np.pad(whole, pad, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, settings.n_fft)[start :: settings.hop][:frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.n_fft) / settings.n_fft)
    power = np.abs(np.fft.rfft(windows * hann, axis=-1)) ** 2  # float64: quiet bins need it
    mel = np.sqrt(power + _POWER_FLOOR) @ _filters(settings).T
    return np.log(np.maximum(mel, settings.floor)).astype(np.float32)


@lru_cache(maxsize=8)
def _filters(settings: MelTargetSpec) -> Float32[np.ndarray, "mels f"]:
    from librosa.filters import mel  # takes a second to import, and most data has no such targets

    return mel(sr=settings.rate, n_fft=settings.n_fft, n_mels=settings.mels, fmin=0.0, fmax=HIGHEST, norm="slaney")
