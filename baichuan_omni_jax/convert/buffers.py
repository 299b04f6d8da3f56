"""Buffers that the released code computes at construction."""

import math

import numpy as np


def sinusoids(length: int, width: int) -> np.ndarray:
    """The position table (length, width), fp32: all sines, then all cosines, of the audio encoder and decoders.

    Rounded as the released code does it: frequencies as fp32 exponentials, angles as fp32 products.
    """
    half = width // 2
    step = np.float32(math.log(10000.0) / (half - 1))
    frequencies = np.exp(-step * np.arange(half, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)
