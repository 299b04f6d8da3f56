"""The TPU and GPU kernels in interpret mode against the reference, and their lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from baichuan_omni_jax.kernels.rvq_lookup import pallas_gpu, pallas_tpu, reference
from baichuan_omni_jax.kernels.rvq_lookup.reference import RELEASED, SMALL, Case
from tests.helpers.typecheck import unchecked

KERNELS = {"tpu": pallas_tpu, "gpu": pallas_gpu}
reference_lookup = jax.jit(reference.lookup)


@functools.cache
def interpreted(kernel: str):
    return jax.jit(functools.partial(KERNELS[kernel].lookup, interpret=True))


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows, codes and width, and several blocks of rows, at sizes that interpret in a moment."""
    for name, value in {"BLOCK_ROWS": 48, "ROWS": 16, "CODES": 32, "WIDTH": 128}.items():
        monkeypatch.setattr(pallas_tpu, name, value)
    for name, value in {"BLOCK_ROWS": 48, "ROWS": 16, "CODES": 32, "WIDTH": 32}.items():
        monkeypatch.setattr(pallas_gpu, name, value)


def assert_same_as_reference(results, want):
    np.testing.assert_array_equal(results[0], want[0])
    np.testing.assert_array_equal(np.asarray(results[1], np.float32), np.asarray(want[1], np.float32))
    np.testing.assert_allclose(results[2], want[2], rtol=1e-6)
    assert [r.dtype for r in results] == [r.dtype for r in want]


@pytest.mark.parametrize(("kernel", "dtype"), [("tpu", "bfloat16"), ("gpu", "float32")])
def test_same_as_the_reference_at_several_scales(kernel, dtype, small_tiles):
    """77 rows of width 300, codebooks of 70 and 33: no multiple of a tile. The kernels see fp32 for either dtype."""
    case = Case("odd", 300, (70, 33))
    codebooks = case.codebooks()
    lookup = jax.jit(functools.partial(KERNELS[kernel].lookup, interpret=True))
    for scale, noise in ((1.0, 0.5), (1e3, 2.0), (1e-3, 0.1)):
        books = [jnp.asarray(book * np.float32(scale)) for book in codebooks]
        x = jnp.asarray(case.frames(77, codebooks, noise) * np.float32(scale), dtype)
        assert_same_as_reference(lookup(x, books), reference_lookup(x, books))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_first_of_equal_codes(kernel, small_tiles):
    """Small whole numbers, so that distances are exact, and codes repeated in other tiles."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (40, 3)), jnp.float32)
    half = rng.integers(-2, 3, (50, 3))
    books = [jnp.asarray(np.concatenate([half, half]), jnp.float32)]
    results = jax.jit(functools.partial(KERNELS[kernel].lookup, interpret=True))(x, books)
    assert_same_as_reference(results, reference_lookup(x, books))
    assert int(results[0].max()) < 50


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_that_is_not_a_number_gets_code_0_and_harms_no_other(kernel):
    case = Case("plain", 16, (20,))
    books = [jnp.asarray(book) for book in case.codebooks()]
    x = jnp.asarray(case.frames(9, case.codebooks(), 1.0)).at[4].set(jnp.nan)
    codes = interpreted(kernel)(x, books)[0]
    np.testing.assert_array_equal(codes, reference_lookup(x, books)[0])
    assert int(codes[4, 0]) == 0


def test_lowers_for_cuda_at_the_released_sizes():
    x = jax.ShapeDtypeStruct((2048, RELEASED.width), jnp.bfloat16)
    books = [jax.ShapeDtypeStruct((size, RELEASED.width), jnp.float32) for size in RELEASED.sizes]
    with unchecked():
        assert pallas_gpu.unsupported(x, books) is None
    # JAX 0.12 asks the mesh which GPU it lowers for.
    card = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 1, platform="cuda"))
    with jax.sharding.use_abstract_mesh(card):
        text = jax.jit(pallas_gpu.lookup).trace(x, books).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


def test_offsets_beyond_32_bits_are_refused():
    x = jax.ShapeDtypeStruct((16384, 2**17), jnp.float32)
    with unchecked():
        assert "32 bits" in pallas_gpu.unsupported(x, [jax.ShapeDtypeStruct((8, 2**17), jnp.float32)])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_as_the_reference_on_the_small_case(kernel):
    """Eight levels, the kernels' own tiles."""
    codebooks = SMALL.codebooks()
    x = jnp.asarray(SMALL.frames(1100, codebooks, 0.5))
    books = [jnp.asarray(book) for book in codebooks]
    assert_same_as_reference(interpreted(kernel)(x, books), reference_lookup(x, books))
