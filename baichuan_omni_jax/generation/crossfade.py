"""Pieces of sound as one: the end of each runs into the beginning of the next."""

import numpy as np
from jaxtyping import Float32

SECONDS = 0.010  # as in the released demos


class CrossFade:
    """The last `samples` of every piece wait for the next one, whose beginning lies over them."""

    def __init__(self, samples: int):
        self._samples, self._held = samples, np.zeros(0, np.float32)

    def push(self, piece: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " t"]:
        """What is ready once `piece` has come; an empty piece changes nothing."""
        if not len(piece):
            return piece
        wave = cross_faded(self._held, piece)
        kept = max(0, len(wave) - self._samples)
        self._held = wave[kept:]
        return wave[:kept]

    def close(self) -> Float32[np.ndarray, " t"]:
        """What waited. The next piece is then a first one."""
        rest, self._held = self._held, np.zeros(0, np.float32)
        return rest


def cross_faded(first: Float32[np.ndarray, " a"], second: Float32[np.ndarray, " b"]) -> Float32[np.ndarray, " t"]:
    """`first` running into `second` over all of the shorter: a + b - min(a, b) samples.

    >>> cross_faded(np.ones(4, np.float32), np.zeros(2, np.float32)).tolist()
    [1.0, 1.0, 0.75, 0.25]
    """
    n = min(len(first), len(second))
    rising = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(max(n, 1))
    before = len(first) - n
    return np.concatenate([first[:before], first[before:] * (1 - rising) + second[:n] * rising, second[n:]])
