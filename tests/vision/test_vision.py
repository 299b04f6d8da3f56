"""The vision branch: pixels against normalized values, one temporal slice against two, and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vision.model import VisionModel
from baichuan_omni_jax.vision.patches import grid_angles, normalize_pixels
from tests.helpers.typecheck import unchecked

CFG = tiny().vision
GRID = jnp.stack(jnp.divmod(jnp.arange(24), 4), -1)[None].astype(jnp.int32)
IDS = jnp.array([[1] * 16 + [0] * 8], jnp.int32)
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 24, 588), np.uint8)


@pytest.fixture(autouse=True)
def _one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


@functools.cache
def model() -> VisionModel:
    return jax.jit(lambda: VisionModel(jax.random.key(0), CFG, ComputePolicy(attention_block=8)))()


@jax.jit
def run(model, patches, grid=GRID, ids=IDS):
    return model(patches, grid, ids)


def normalized(pixels: np.ndarray) -> np.ndarray:
    channels = (pixels.reshape(*pixels.shape[:2], 3, -1) / 255.0 - np.array(CFG.image_mean)[:, None]) / np.array(
        CFG.image_std
    )[:, None]
    return channels.reshape(pixels.shape).astype(np.float32)


def test_pixels_are_normalized_per_channel():
    np.testing.assert_allclose(
        normalize_pixels(jnp.asarray(PIXELS), CFG.image_mean, CFG.image_std), normalized(PIXELS), atol=1e-5
    )


@pytest.mark.slow
def test_a_still_as_pixels_equals_two_equal_slices():
    slices = normalized(PIXELS).reshape(1, 24, 3, 1, 196).repeat(2, 3).reshape(1, 24, 1176)
    np.testing.assert_allclose(run(model(), PIXELS), run(model(), slices), atol=1e-5)


def test_grid_angles():
    angles = grid_angles(jnp.array([[[2, 3]]], jnp.int32), 8)
    np.testing.assert_allclose(angles[0, 0], [2, 0.02, 3, 0.03], rtol=1e-6)


@pytest.mark.slow
def test_padding_is_zero_and_changes_nothing():
    noisy = PIXELS.copy()
    noisy[:, 16:] = 255 - noisy[:, 16:]
    out = run(model(), PIXELS)
    assert out.shape == (1, 6, CFG.out_dim)
    np.testing.assert_array_equal(out, run(model(), noisy))
    np.testing.assert_array_equal(out[:, 4:], 0)


@pytest.mark.slow
def test_no_gradient_flows_into_padding():
    gradient = jax.jit(jax.grad(lambda x: jnp.square(model()(x, GRID, IDS)).sum()))(normalized(PIXELS))
    assert np.abs(gradient[:, :16]).max(-1).min() > 0
    np.testing.assert_array_equal(gradient[:, 16:], 0)


def test_errors():
    pixels = jnp.asarray(PIXELS)
    with pytest.raises(ValueError, match="expected 588 uint8 or normalized values a patch, or 1176"):
        model()(pixels[..., :100], GRID, IDS)
    with unchecked(), pytest.raises(ValueError, match="rows and patches must agree"):
        model()(pixels, GRID[:, :12], IDS)
    with pytest.raises(ValueError, match="22 patches are not a multiple of 4"):
        model()(pixels[:, :22], GRID[:, :22], IDS[:, :22])
