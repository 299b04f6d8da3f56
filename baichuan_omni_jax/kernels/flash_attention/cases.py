"""The heads and packings that every back end is tried on, at two sizes.

`SMALL` is for the reference and for interpreted kernels (rows up to 1536 tokens, blocks of 128), `REAL` for compilation
and timing (rows of 65536 tokens, blocks of 512). Both hold the same names with the same heads and patterns.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.kernels.flash_attention.plan import Segments


@dataclass(frozen=True)
class Heads:
    """How many query and key heads, their width, and whether a token sees only what is not later than itself."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool


LLM = Heads(28, 4, 128, causal=True)
VIT = Heads(16, 16, 80, causal=False)
WHISPER = Heads(20, 20, 64, causal=False)


@dataclass(frozen=True)
class Case:
    """Packed rows of `length` tokens: `documents` has the lengths of each row's documents, the rest is padding.

    `permuted`: the row's blocks in a random order, as context parallelism deals them.
    """

    name: str
    heads: Heads
    length: int
    block: int
    documents: tuple[tuple[int, ...], ...]
    permuted: bool = False

    def ids_and_positions(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Segment ids (ascending from 1, 0 is padding) and positions, int32 (rows, length), before any device."""
        ids, positions = (np.stack(rows) for rows in zip(*(self._row(d) for d in self.documents), strict=True))
        if self.permuted:
            order = np.random.default_rng(seed).permutation(self.length // self.block)
            ids, positions = (permute_blocks(x, order, self.block) for x in (ids, positions))
        return ids, positions

    def segments(self, seed: int = 0) -> Segments:
        return Segments.from_row(*(jnp.asarray(x) for x in self.ids_and_positions(seed)))

    def arrays(self, dtype=jnp.float32, seed: int = 0) -> list[jax.Array]:
        """Standard normal q, k, v and a cotangent for the output: (rows, length, heads, head_dim)."""
        rng = np.random.default_rng(seed)
        return [jnp.asarray(rng.standard_normal(x.shape, np.float32), dtype) for x in self.shapes(dtype)]

    def shapes(self, dtype=jnp.float32) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what `arrays` returns."""
        counts = (self.heads.heads, self.heads.kv_heads, self.heads.kv_heads, self.heads.heads)
        return [
            jax.ShapeDtypeStruct((len(self.documents), self.length, count, self.heads.head_dim), dtype)
            for count in counts
        ]

    def _row(self, documents: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        padding = self.length - sum(documents)
        ids = np.repeat(np.arange(1, len(documents) + 1), documents)
        positions = [np.arange(size) for size in documents]
        padded = [np.pad(x, (0, padding)).astype(np.int32) for x in (ids, np.concatenate([[], *positions]))]
        return padded[0], padded[1]


def permute_blocks(x: np.ndarray, order: np.ndarray, block: int) -> np.ndarray:
    """(rows, length) with its blocks in another order: block i of the result is block order[i]."""
    return x.reshape(len(x), -1, block)[:, order].reshape(x.shape)


def fill(length: int, sizes: np.ndarray) -> tuple[int, ...]:
    """The first of `sizes` that fill a row, the last one cut to fit."""
    ends = np.minimum(np.cumsum(np.maximum(sizes, 1)), length)
    filled = np.diff(ends, prepend=0)
    return tuple(int(size) for size in filled if size)


def log_normal(length: int, mean: int, sigma: float = 1.0, seed: int = 0) -> tuple[int, ...]:
    """Document lengths as text has them: a full row of log-normal sizes with this mean."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, 8 * length)
    return fill(length, draws.astype(np.int64))


def frames(length: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Frame sizes around `mean` (by up to 30 %, multiples of 4), as many whole ones as fit."""
    sizes = 4 * np.random.default_rng(seed).integers(int(0.7 * mean) // 4, int(1.3 * mean) // 4, length)
    return tuple(int(size) for size in sizes[np.cumsum(sizes) <= length])


def _cases(length: int, block: int, *, text: int, frame: int, clip: int) -> dict[str, Case]:
    """By name; `text`, `frame` and `clip` are lengths of a document, an image (both means) and a stretch of audio."""
    many = max(length, 1536)
    uneven = (1, length // 2 + 3, 7, length // 4 - 1, block - 30, 2)
    cases = (
        Case("llm", LLM, length, block, (log_normal(length, text), log_normal(length - block // 2, text, seed=1))),
        Case("vit", VIT, length, block, (frames(length, frame),)),
        Case("whisper", WHISPER, length, block, ((clip,) * (length // clip),)),
        Case("uneven", LLM, length, block, (uneven,)),
        Case("one_document", LLM, length, block, ((length,),)),
        Case("thousand_documents", LLM, many, block, ((many // 1500, many // 750) * 500,)),
        Case("padding_only", LLM, length, block, ((),)),
        Case("permuted_blocks", LLM, length, block, (log_normal(length, 4 * text, seed=2),), permuted=True),
    )
    return {case.name: case for case in cases}


SMALL = _cases(512, 128, text=60, frame=100, clip=150)
REAL = _cases(65536, 512, text=3000, frame=1024, clip=1500)
