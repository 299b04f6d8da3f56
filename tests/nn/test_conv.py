"""The time axis: overlapping pieces added up, and items stretched by their own lengths."""

import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.nn.layers import overlap_add, resize_nearest
from tests.helpers.untrained import normal


def test_overlap_add_and_resize(rng):
    pieces = normal(rng, 1, 4, 7, 2)
    expected = np.zeros((1, 3 * 3 + 7, 2), np.float32)
    for i in range(4):
        expected[:, 3 * i : 3 * i + 7] += pieces[:, i]
    np.testing.assert_allclose(overlap_add(jnp.asarray(pieces), 3, None), expected, atol=1e-6)
    x = jnp.arange(8.0).reshape(1, 8, 1).repeat(2, 0)
    resized = resize_nearest(x, jnp.array([4, 8], jnp.int32), jnp.array([3, 5], jnp.int32), 5)
    np.testing.assert_array_equal(resized[..., 0], [[0, 1, 2, 3, 3], [0, 1, 3, 4, 6]])
