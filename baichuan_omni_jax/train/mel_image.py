"""Mels as small colour pictures, without a plotting library: training machines need none."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

# Colours from the least to the greatest value: black, violet, red, orange, pale yellow.
_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
_PIXELS = 3  # of a mel filter and of a frame
_GAP = 6


def mel_image(mels: Sequence[Float[np.ndarray, "_ mels"]]) -> UInt8[np.ndarray, "h w 3"]:
    """Log mels (frames, mels) one above the other, on one scale of colours: time to the right, low filters below.

    The others are stretched (nearest) to the first one's length. Values that are not finite are drawn as the least.
    """
    width = max(len(mels[0]), 1)
    stretched = [_stretched(mel, width) for mel in mels]
    values = np.concatenate([mel.ravel() for mel in stretched])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    panels = []
    for mel in stretched:
        share = np.nan_to_num((mel - low) / max(high - low, 1e-9), nan=0.0, posinf=0.0, neginf=0.0)
        panel = _coloured(share.T[::-1]).repeat(_PIXELS, 0).repeat(_PIXELS, 1)
        panels += [panel, np.full((_GAP, panel.shape[1], 3), 255, np.uint8)]
    return np.concatenate(panels[:-1])


def _stretched(mel: np.ndarray, frames: int) -> np.ndarray:
    if not len(mel):
        return np.full((frames, mel.shape[1]), np.nan)
    return mel[np.arange(frames) * len(mel) // frames]


def _coloured(share: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Colours of values in [0, 1]."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(share, at, channel) for channel in _COLOURS.T], -1).astype(np.uint8)
