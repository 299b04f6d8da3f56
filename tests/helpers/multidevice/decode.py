"""Decoding with a cache on one device and on eight: prints the largest difference of the logits.

Run by test_decode_mesh.py with eight CPU devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.llm.kv_cache import init_cache
from baichuan_omni_jax.sharding import make_mesh
from tests.helpers.decoding import LENGTH, ROWS, decode, distance, small_llm


def logits(mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> np.ndarray:
    """Of all items that are decoded, and the cache's share on one device."""
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        model = small_llm().to_decode_layout()
        cache = init_cache(model.cfg, len(ROWS), LENGTH, dtype, model.compute)
        made, known, cache = decode(model, cache, (5, 5))
    entries = cache.layers[0].k
    assert entries.addressable_shards[0].data.size * len(mesh.devices.flat) == entries.size, entries.sharding
    return made[known]


def main() -> None:
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    eight = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for dtype in (jnp.float32, jnp.int8):
        print(jnp.dtype(dtype), distance(logits(eight, dtype), logits(one, dtype)))


if __name__ == "__main__":
    main()
