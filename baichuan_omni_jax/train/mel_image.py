"""Mels as small colour pictures, without a plotting library: training machines need none."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float, UInt8

from baichuan_omni_jax.audio.mel_training import SAME_RATE, same_moments

# Colours from the least to the greatest value: black, violet, red, orange, pale yellow.
_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
_PIXELS = 3  # of a mel filter and of a frame
_GAP = 6


def mel_image(
    mels: Sequence[Float[np.ndarray, "_ mels"]], ratios: Sequence[Fraction] = ()
) -> UInt8[np.ndarray, "h w 3"]:
    """Log mels (frames, mels) one above the other, on one scale of colours: time to the right, low filters below.

    `ratios` (default: 1 each) are frames of each mel for a frame of the first, at whose moments the others are drawn.
    Where one has ended, and where a value is not finite, the least is drawn.
    """
    width, ratios = max(len(mels[0]), 1), ratios or [SAME_RATE] * len(mels)
    drawn = [_at_moments(mel, same_moments(width, ratio)) for mel, ratio in zip(mels, ratios, strict=True)]
    values = np.concatenate([mel.ravel() for mel in drawn])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    panels = []
    for mel in drawn:
        share = np.nan_to_num((mel - low) / max(high - low, 1e-9), nan=0.0, posinf=0.0, neginf=0.0)
        panel = _coloured(share.T[::-1]).repeat(_PIXELS, 0).repeat(_PIXELS, 1)
        panels += [panel, np.full((_GAP, panel.shape[1], 3), 255, np.uint8)]
    return np.concatenate(panels[:-1])


def _at_moments(mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The given frames of a mel, NaN where it has ended."""
    ended = np.full((max(frames[-1] + 1 - len(mel), 0), mel.shape[1]), np.nan)
    return np.concatenate([mel, ended])[frames]


def _coloured(share: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Colours of values in [0, 1]."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(share, at, channel) for channel in _COLOURS.T], -1).astype(np.uint8)
