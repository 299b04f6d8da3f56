"""The bf16 search of the XLA implementation: it must not lose the nearest code, whatever the frames look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.kernels.rvq_lookup import xla


def near_copies(rng, rows, size, width):
    """Frames and codes around one far point, apart by far less than bf16 resolves there."""
    center = 100 * rng.standard_normal(width)
    return center + 0.01 * rng.standard_normal((rows, width)), center + 0.01 * rng.standard_normal((size, width))


def normal(rng, rows, size, width):
    return rng.standard_normal((rows, width)), rng.standard_normal((size, width))


def on_codes(rng, rows, size, width):
    codes = rng.standard_normal((size, width))
    return codes[rng.integers(0, size, rows)] + 0.1 * rng.standard_normal((rows, width)), codes


def unlike_lengths(rng, rows, size, width):
    lengths = 10.0 ** rng.uniform(-3, 1, (size, 1))
    return rng.standard_normal((rows, width)), rng.standard_normal((size, width)) * lengths


DATA = (near_copies, normal, on_codes, unlike_lengths)
search = jax.jit(lambda x, book: xla.search(x, xla.prepare(book)))
nearest = jax.jit(lambda x, book: xla.nearest(x, xla.prepare(book)))


@pytest.fixture
def searched(monkeypatch):
    """Searches small codebooks too; blocks small enough for several."""
    for name, value in {"SEARCHED": 0, "CANDIDATES": 8, "PAIRS": 16, "FULL_ROWS": 8}.items():
        monkeypatch.setattr(xla, name, value)


def example(data, seed=0):
    """fp32 frames and codes, and all distances squared in float64."""
    x, book = (part.astype(np.float32) for part in data(np.random.default_rng(seed), 61, 100, 48))
    return jnp.asarray(x), jnp.asarray(book), ((x[:, None].astype(np.float64) - book[None]) ** 2).sum(-1)


@pytest.mark.parametrize("data", DATA)
def test_the_nearest_is_kept_or_the_row_is_given_up(data, searched):
    x, book, distances = example(data)
    candidates, kept, complete = (np.asarray(result) for result in search(x, book))
    found = ((candidates == distances.argmin(1)[:, None]) & kept).any(1)
    assert (found | ~complete).all()
    if data is on_codes:
        assert complete.all()
        assert kept.sum() < 1.1 * len(kept)
    if data is near_copies:
        assert not complete.any()


@pytest.mark.parametrize("data", DATA)
def test_finds_the_nearest(data, searched):
    """Up to fp32 rounding: of distances written out, or where a row is compared with all codes, of |x| |c|."""
    x, book, distances = example(data)
    code = np.asarray(nearest(x, book))
    rounding = 1e-5 * np.linalg.norm(x, axis=1) * np.linalg.norm(book, axis=1).max() if data is near_copies else 1e-5
    assert (distances[np.arange(61), code] - distances.min(1) <= rounding).all()
    if data is not near_copies:
        np.testing.assert_array_equal(code, distances.argmin(1))


@pytest.mark.parametrize("repeats", [2, 20])
def test_the_first_of_equal_codes(repeats, searched):
    """As few copies as are candidates, and more."""
    x, book, distances = example(normal)
    code = nearest(x, jnp.tile(book, (repeats, 1)))
    np.testing.assert_array_equal(code, distances.argmin(1))


def test_rows_that_are_not_finite_get_code_0_and_harm_no_other(searched):
    x, book, distances = example(normal)
    code = np.asarray(nearest(x.at[3].set(jnp.nan).at[5].set(jnp.inf), book))
    assert code[3] == code[5] == 0
    others = ~np.isin(np.arange(61), [3, 5])
    np.testing.assert_array_equal(code[others], distances.argmin(1)[others])
