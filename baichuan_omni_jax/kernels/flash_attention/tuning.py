"""How much of the TPU's on-chip memory the attention kernels take."""

import jax.numpy as jnp

# v5e and v6e have 128 MiB of VMEM a core, v5p and 7x 64.
VMEM_LIMIT_BYTES = 48 * 2**20
_BLOCKS_BYTES = 20 * 2**20
# int32, prefetched to the 1 MiB of scalar memory.
MAX_PAIRS = 160 * 1024
_MAX_HEADS = 8


def kv_heads_a_step(kv_heads: int, group: int, head_dim: int, block_q: int, block_kv: int, dtype) -> int:
    """How many key heads (with their `group` of query heads) share a grid step, its mask and its overhead.

    The backward kernels decide: q, d_out and dq, k, v and their gradients, double-buffered, and fp32 sums.
    """
    size = jnp.dtype(dtype).itemsize
    a_query, a_key = 3 * 2 * size + 4, 4 * 2 * size + 2 * 4
    a_head = head_dim * (group * block_q * a_query + block_kv * a_key)
    fits = max(1, min(_BLOCKS_BYTES // a_head, _MAX_HEADS // group))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fits)
