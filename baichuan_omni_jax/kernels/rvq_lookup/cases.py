"""The codebooks that every back end is tried on, at two sizes, and rows to look up in them.

`SMALL` is for the reference, which holds (rows, codes, width), and for interpreted kernels; `RELEASED` for compilation
and timing. Both have eight levels whose sizes differ and shrink.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """Codebooks of `sizes` codes, `width` numbers each."""

    name: str
    width: int
    sizes: tuple[int, ...]

    def codebooks(self, seed: int = 0) -> list[np.ndarray]:
        """Normal codes, each level at 0.7 of the scale of the level before: residuals shrink as in a trained stack."""
        rng = np.random.default_rng(seed)
        scales = 0.7 ** np.arange(len(self.sizes))
        return [
            rng.standard_normal((size, self.width), np.float32) * np.float32(scale)
            for size, scale in zip(self.sizes, scales, strict=True)
        ]

    def frames(self, rows: int, codebooks: list[np.ndarray], noise: float, seed: int = 1) -> np.ndarray:
        """A random code of each level, summed, plus normal noise of the first level's scale times `noise`."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((rows, self.width), np.float32) * np.float32(noise)
        for codebook in codebooks:
            x += codebook[rng.integers(0, len(codebook), rows)]
        return x


# Two of the sizes are no multiple of any tile; the width is none of a power of two.
SMALL = Case("small", 160, (300, 129, 64, 33, 33, 33, 33, 33))
RELEASED = Case("released", 5120, (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024))
