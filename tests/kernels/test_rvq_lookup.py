"""Residual lookup: every implementation against the definition in float64, ties, blocks of rows, shards, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.kernels.rvq_lookup import prepare_codebooks, rvq_lookup, xla
from baichuan_omni_jax.kernels.rvq_lookup.reference import lookup_blocks
from baichuan_omni_jax.sharding import make_mesh
from tests.helpers.typecheck import unchecked

IMPLEMENTATIONS = ("xla", "reference")


def definition(x: np.ndarray, codebooks: list[np.ndarray]):
    """float64: codes, the sum of the chosen, residual norms, and by how much the second nearest is farther."""
    residual, codes, norms, margins = x.astype(np.float64), [], [], []
    for codebook in codebooks:
        distance = np.linalg.norm(residual[:, None] - codebook[None].astype(np.float64), axis=-1)
        code = distance.argmin(1)
        ordered = np.sort(distance, 1)
        margins.append(ordered[:, 1] - ordered[:, 0] if ordered.shape[1] > 1 else np.full(len(x), np.inf))
        residual = residual - codebook[code]
        codes.append(code)
        norms.append(np.linalg.norm(residual, axis=1))
    return np.stack(codes, 1), x - residual, np.stack(norms, 1), np.stack(margins, 1)


def arrays(codebooks: list[np.ndarray]) -> list[jax.Array]:
    return [jnp.asarray(codebook) for codebook in codebooks]


def random_case(rows: int, width: int, sizes: list[int], seed: int):
    rng = np.random.default_rng(seed)
    codebooks = [rng.standard_normal((size, width)).astype(np.float32) * 0.7**q for q, size in enumerate(sizes)]
    return rng.standard_normal((rows, width)).astype(np.float32), codebooks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_definition(implementation):
    x, codebooks = random_case(300, 24, [64, 48, 17, 1], seed=0)
    codes, quantized, norms = rvq_lookup(jnp.asarray(x), arrays(codebooks), implementation=implementation)
    want_codes, want_quantized, want_norms, margins = definition(x, codebooks)
    assert margins.min() > 1e-5
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_allclose(quantized, want_quantized, atol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)
    assert (codes.dtype, quantized.dtype, norms.dtype) == (jnp.int32, jnp.float32, jnp.float32)


@settings(max_examples=8)
@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 5]),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    block=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_blocks_with_ties(rows, width, sizes, block, seed):
    """Small whole numbers: distances are exact, ties are common, the first index must win."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (rows, width)).astype(np.float32)
    codebooks = [rng.integers(-2, 3, (size, width)).astype(np.float32) for size in sizes]
    want_codes, want_quantized, _, _ = definition(x, codebooks)
    codes, quantized, _ = xla.lookup(jnp.asarray(x), arrays(codebooks), block_rows=block)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(quantized, want_quantized)


def test_blocks_of_rows_are_even():
    """Nine rows, at most eight at a time, are blocks of five and not of eight."""
    sizes = []

    def nearest(x, level):
        sizes.append(x.shape[0])
        return jnp.zeros(x.shape[0], jnp.int32)

    codes, _, _ = lookup_blocks(jnp.ones((9, 2)), [xla.prepare(jnp.ones((1, 2)))], nearest, 8)
    assert codes.shape == (9, 1)
    assert set(sizes) == {5}


def test_the_residual_stays_in_the_dtype_of_x():
    x, codebooks = random_case(64, 16, [32, 32, 32], seed=1)
    half = jnp.asarray(x, jnp.bfloat16)
    results = [rvq_lookup(half, arrays(codebooks), implementation=name) for name in IMPLEMENTATIONS]
    residual = half
    for q, codebook in enumerate(codebooks):
        code = np.asarray(results[0][0][:, q])
        distance = np.linalg.norm(np.asarray(residual, np.float64)[:, None] - codebook[None], axis=-1)
        np.testing.assert_array_equal(code, distance.argmin(1))
        residual = residual - jnp.asarray(codebook[code], jnp.bfloat16)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6)
    assert results[0][1].dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prepared_codebooks_give_the_same(implementation, monkeypatch):
    monkeypatch.setattr(xla, "SEARCHED", 0)
    x, codebooks = random_case(64, 16, [33, 32], seed=4)
    prepared = prepare_codebooks(arrays(codebooks), implementation=implementation)
    results = rvq_lookup(jnp.asarray(x), prepared, implementation=implementation)
    for one, other in zip(results, rvq_lookup(jnp.asarray(x), arrays(codebooks), implementation="xla"), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6)


def test_no_gradient_passes():
    x, codebooks = random_case(8, 4, [5, 5], seed=2)
    gradient = jax.grad(lambda x: rvq_lookup(x, arrays(codebooks))[1].sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, 0)


def test_no_rows():
    codes, quantized, norms = rvq_lookup(jnp.zeros((0, 4)), [jnp.zeros((3, 4))] * 2)
    assert (codes.shape, quantized.shape, norms.shape) == ((0, 2), (0, 4), (0, 2))


def test_never_holds_rows_by_codes_by_width():
    """Temporaries stay near one block's scores, (1024, 512) fp32, for many rows."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16384, 64), (512, 64))]
    compiled = jax.jit(lambda x, book: rvq_lookup(x, [book])).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (1024 * 512 * 4) + 2 * 16384 * 64 * 4


def test_keeps_the_split_of_the_rows():
    x, codebooks = random_case(8, 4, [5, 6], seed=3)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
        split_book = jax.device_put(codebooks[1], NamedSharding(mesh, PartitionSpec("context", None)))
        prepared = jax.jit(prepare_codebooks)((codebooks[0], split_book))
        results = jax.jit(lambda x, *books: rvq_lookup(x, books))(jax.device_put(x, place), codebooks[0], split_book)
        assert all(jax.typeof(result).sharding.spec == place.spec for result in results)
        np.testing.assert_array_equal(results[0], definition(x, codebooks)[0])
        np.testing.assert_array_equal(rvq_lookup(jax.device_put(x, place), prepared)[0], results[0])
        narrow = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "context")))
        with pytest.raises(ValueError, match="split along its width over context"):
            rvq_lookup(narrow, arrays(codebooks))


@pytest.mark.parametrize(
    ("x", "codebooks", "implementation", "message"),
    [
        (
            np.zeros((2, 3), np.float32),
            [np.zeros((4, 3))],
            "cuda",
            "'cuda' is not one of pallas_tpu, pallas_gpu, xla, reference",
        ),
        (np.zeros((2, 3), np.float32), [], None, "at least one codebook"),
        (np.zeros((2, 3), np.float32), [np.zeros((4, 3)), np.zeros((4, 2))], None, r"codebook 1 is \(4, 2\)"),
        (np.zeros((2, 3), np.float32), [np.zeros((0, 3))], None, "at least one code"),
        (np.zeros((2, 3), np.int32), [np.zeros((4, 3))], None, "must be floating point"),
        (np.zeros(3, np.float32), [np.zeros((4, 3))], None, r"vectors \(n, d\)"),
    ],
)
def test_errors(x, codebooks, implementation, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        rvq_lookup(jnp.asarray(x), [jnp.asarray(book) for book in codebooks], implementation=implementation)


@pytest.mark.parametrize(
    ("codebooks", "name", "message"), [([], None, "at least one codebook"), ([0], "cuda", "'cuda' is not one of")]
)
def test_what_cannot_be_prepared(codebooks, name, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        prepare_codebooks(codebooks, implementation=name)
