"""int8 products: near those of fp32, as qwix computes them, right on average, and the same bits on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.nn.int8 import Dither, int8_product, int8_weight
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import ComputePolicy
from tests.helpers.micro import run_on_devices

COMPUTE = ComputePolicy()
# Relative RMS of normal numbers: half a step of 127 for the largest of some hundred, of both operands.
NEAR = 0.015
# The projections of the language model's layers: equation, shape, dims that are summed over.
PROJECTIONS = {
    "into_mlp": ("btd,df->btf", (96, 160), (0,)),
    "into_heads": ("btd,dnh->btnh", (96, 4, 24), (0,)),
    "out_of_heads": ("btnh,nhd->btd", (4, 24, 96), (0, 1)),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms(found, expected) -> float:
    return float(np.sqrt(np.mean((np.asarray(found) - expected) ** 2) / np.mean(np.asarray(expected) ** 2)))


def multiply(equation, x, w, dy, dither=None, compute=COMPUTE):
    """The product, and its gradients toward `x` and `w`, for the gradient `dy` of the result."""
    _, letters, result = equation.replace("->", ",").split(",")
    summed = tuple(i for i, letter in enumerate(letters) if letter not in result)

    def product(x, w):
        weight = int8_weight(nnx.Param(w, axes=("small",) * w.ndim), summed, compute)
        return int8_product(equation, x, weight, out=None, dither=dither)

    y, pull = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    return y, *pull(jnp.asarray(dy, y.dtype))


def drawn(name: str) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    equation, shape, summed = PROJECTIONS[name]
    x = normal(0, 2, 8, *(shape[i] for i in summed))
    dy = normal(2, 2, 8, *(size for i, size in enumerate(shape) if i not in summed))
    return equation, x, normal(1, *shape), dy


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dithered", [False, True])
def test_values_and_gradients_are_near_those_of_fp32(name, dithered):
    equation, x, w, dy = drawn(name)
    dither = Dither.draw(jax.random.key(3), 2, 8, COMPUTE) if dithered else None
    y, dx, dw = multiply(equation, x, w, dy, dither)
    expected, pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    of_x, of_w = pull(dy)
    assert 1e-3 < rms(y, expected) <= NEAR
    assert 1e-3 < rms(dx, of_x) <= NEAR
    # Nothing of it is rounded.
    assert rms(dw, of_w) <= 1e-5


@pytest.mark.parametrize("name", PROJECTIONS)
def test_values_and_input_gradients_are_those_of_qwix(name):
    pytest.importorskip("qwix", reason="an oracle; extra `parity`")
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    equation, x, w, dy = drawn(name)
    # Its scale maps the largest number to 127.5, ours to 127.
    kinds = dict.fromkeys(("lhs_qtype", "rhs_qtype", "dlhs_grad_qtype"), jnp.int8)
    ranges = ("lhs_calibration_method", "rhs_calibration_method", "dlhs_grad_calibration_method")
    config = DotGeneralQtConfig(**kinds, **dict.fromkeys(ranges, f"absmax,{127.5 / 127}"))
    summed = PROJECTIONS[name][2]
    dims = ((tuple(range(2, x.ndim)), summed), ((), ()))
    expected, pull = jax.vjp(lambda x: dot_general_qt(x, jnp.asarray(w), dims, config), jnp.asarray(x))
    y, dx, _ = multiply(equation, x, w, dy)
    # Where scales differ in their last bit, a number halfway between two may go to the other.
    assert rms(y, expected) <= 1e-3
    assert rms(dx, pull(dy)[0]) <= 1e-3


@partial(jax.jit, static_argnums=1)
def gradients_of_identity(dy: jax.Array, draws: int) -> jax.Array:
    """What is left of `dy` after a product with the identity, which int8 holds exactly, for many keys."""

    def once(key):
        dither = Dither.draw(key, *dy.shape[:2], COMPUTE)
        return multiply("btd,df->btf", jnp.ones_like(dy), jnp.eye(dy.shape[2]), dy, dither)[1]

    return jax.vmap(once)(jax.random.split(jax.random.key(0), draws))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 4))
def test_rounding_by_chance_is_right_on_average(seed, spread):
    """Most numbers lie below half a step where one is large: rounded to the nearest, nothing would be left of them."""
    draws, dy = 2000, np.sign(normal(seed, 2, 3, 16)) * np.exp(spread * normal(seed + 1, 2, 3, 16))
    found = np.asarray(gradients_of_identity(dy, draws))
    # In steps: the mean is off by sqrt(p (1 - p) / draws), and by a little where the numbers are rounded themselves.
    step = np.abs(dy).max(-1, keepdims=True) / 127
    part = dy / step - np.floor(dy / step)
    off = np.abs(found.mean(0) - dy) / step
    assert (off <= 6 * np.sqrt(part * (1 - part) / draws) + 0.004).all()


def test_sums_vary_as_those_of_independent_numbers():
    """Over channels and over positions: errors of one row or one column do not go together."""
    dy = np.full((1, 64, 64), 0.3, np.float32)
    dy[..., -1] = 127  # the scale is 1
    found = np.asarray(gradients_of_identity(dy, 500))[..., :-1]
    single = 0.3 * 0.7
    assert found.sum(3).var(0).mean() == pytest.approx(63 * single, rel=0.1)
    assert found.sum(2).var(0).mean() == pytest.approx(64 * single, rel=0.1)
    assert found.sum((2, 3)).var(0).mean() == pytest.approx(63 * 64 * single, rel=0.3)


def test_zeros_and_what_is_not_finite():
    zeros = multiply("btd,df->btf", np.zeros((1, 2, 4), np.float32), np.zeros((4, 3), np.float32), np.zeros((1, 2, 3)))
    assert not any(np.asarray(each).any() for each in zeros)
    x = np.ones((1, 2, 4), np.float32)
    x[0, 0, 1] = np.nan
    y, _, _ = multiply("btd,df->btf", x, np.ones((4, 3), np.float32), np.ones((1, 2, 3), np.float32))
    assert np.isnan(y[0, 0]).all()
    np.testing.assert_allclose(y[0, 1], 4, rtol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_a_layer_multiplies_in_int8_only_where_it_is_told_to(int8):
    axes = ("embed", "mlp")
    linear = Linear(
        jax.random.key(0), "btd,df->btf", (4, 6), axes, out=("batch", "length", "act_mlp"), compute=COMPUTE, int8=int8
    )
    program = jax.jit(lambda x: linear(x)).lower(jnp.ones((1, 2, 4))).as_text()
    assert ("i8>" in program) is int8


def test_eight_devices_give_the_bits_of_one(tmp_path):
    run_on_devices("int8.py", tmp_path / "xla")
