"""Short packed rows that the tests of attention and of its plan share."""

import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.kernels.flash_attention import Segments

LENGTH, BLOCK = 40, 8


def row(lengths: list[int], length: int = LENGTH, *, ids: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (from 1; or `ids`, 0 for padding) and positions of documents of these lengths, then padding."""
    row_ids, positions, start = np.zeros(length, np.int32), np.zeros(length, np.int32), 0
    for i, size in enumerate(lengths):
        size = min(size, length - start)
        row_ids[start : start + size] = ids[i] if ids else i + 1
        positions[start : start + size] = np.arange(size)
        start += size
    return row_ids, positions


def segments_of(*rows: tuple[np.ndarray, np.ndarray]) -> Segments:
    ids, positions = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    return Segments.from_row(ids, positions)


def permuted(segments: Segments, order: list[int], block: int = BLOCK) -> Segments:
    """The row's blocks in another order, as the context plan deals them."""
    return Segments(*(x.reshape(x.shape[0], -1, block)[:, np.array(order)].reshape(x.shape) for x in segments))
