"""The vision branch untrained: what a patch is, packed frames that do not see each other, padding, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.vision.model import VisionModel, grid_angles, normalize_pixels
from tests.helpers.micro import one_device
from tests.helpers.typecheck import unchecked
from tests.helpers.untrained import COMPUTE, KEY, VISION, assert_close, untrained

pytestmark = pytest.mark.usefixtures("exact")
VALUES = VISION.patch_values
GRID = jnp.stack(jnp.divmod(jnp.arange(24), 4), -1)[None].astype(jnp.int32)
IDS = jnp.array([[1] * 16 + [0] * 8], jnp.int32)
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 24, VALUES), np.uint8)


@functools.cache
def model() -> VisionModel:
    return untrained(lambda: VisionModel(KEY, VISION, COMPUTE))


@jax.jit
def run(model, patches, grid=GRID, ids=IDS):
    return model(patches, grid, ids)


def normalized(pixels: np.ndarray) -> np.ndarray:
    channels = (pixels.reshape(*pixels.shape[:2], 3, -1) / 255.0 - np.array(VISION.image_mean)[:, None]) / np.array(
        VISION.image_std
    )[:, None]
    return channels.reshape(pixels.shape).astype(np.float32)


def test_pixels_are_normalized_per_channel():
    np.testing.assert_allclose(
        normalize_pixels(jnp.asarray(PIXELS), VISION.image_mean, VISION.image_std), normalized(PIXELS), atol=1e-5
    )


def test_a_still_as_pixels_equals_two_equal_slices():
    slices = normalized(PIXELS).reshape(1, 24, 3, 1, -1).repeat(2, 3).reshape(1, 24, 2 * VALUES)
    np.testing.assert_allclose(run(model(), PIXELS), run(model(), slices), atol=1e-5)


def test_grid_angles():
    angles = grid_angles(jnp.array([[[2, 3]]], jnp.int32), 8)
    np.testing.assert_allclose(angles[0, 0], [2, 0.02, 3, 0.03], rtol=1e-6)


def test_padding_is_zero_and_changes_nothing():
    noisy = PIXELS.copy()
    noisy[:, 16:] = 255 - noisy[:, 16:]
    out = run(model(), PIXELS)
    assert out.shape == (1, 6, VISION.out_dim)
    np.testing.assert_array_equal(out, run(model(), noisy))
    np.testing.assert_array_equal(out[:, 4:], 0)


def test_packed_frames_do_not_see_each_other():
    """A frame gives the same tokens behind another one, alone, and beside other pixels."""
    ids = jnp.array([[1] * 8 + [2] * 16], jnp.int32)
    packed = run(model(), PIXELS, GRID, ids)
    alone = run(model(), PIXELS[:, 8:], GRID[:, 8:], jnp.ones((1, 16), jnp.int32))
    other = PIXELS.copy()
    other[:, :8] = 255 - other[:, :8]
    beside = run(model(), other, GRID, ids)
    assert_close(packed[:, 2:], alone)
    np.testing.assert_array_equal(packed[:, 2:], beside[:, 2:])
    assert np.abs(np.asarray(packed - beside))[:, :2].max() > 1e-3


def test_where_a_frame_lies_in_its_image_matters_and_only_there():
    """Rotary angles are relative: a frame moved as a whole gives the same, two of its rows exchanged do not."""
    moved = run(model(), PIXELS, GRID + jnp.array([3, 5], jnp.int32))
    assert_close(moved, run(model(), PIXELS), 1e-4)
    exchanged = run(model(), PIXELS, GRID[:, ::-1])
    assert np.abs(np.asarray(exchanged - moved)).max() > 1e-3


def test_a_mesh_of_one_device_changes_nothing():
    with jax.set_mesh(one_device()):
        meshed = jax.jit(lambda pixels: model()(pixels, GRID, IDS))(PIXELS)
    assert_close(meshed, run(model(), PIXELS))


def test_no_gradient_flows_into_padding():
    gradient = jax.jit(jax.grad(lambda x: jnp.square(model()(x, GRID, IDS)).sum()))(normalized(PIXELS))
    assert np.abs(gradient[:, :16]).max(-1).min() > 0
    np.testing.assert_array_equal(gradient[:, 16:], 0)


def test_errors():
    pixels = jnp.asarray(PIXELS)
    with pytest.raises(ValueError, match="expected 48 uint8 or normalized values a patch, or 96"):
        model()(pixels[..., :20], GRID, IDS)
    with unchecked(), pytest.raises(ValueError, match="rows and patches must agree"):
        model()(pixels, GRID[:, :12], IDS)
    with pytest.raises(ValueError, match="22 patches are not a multiple of 4"):
        model()(pixels[:, :22], GRID[:, :22], IDS[:, :22])
