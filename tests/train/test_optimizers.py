"""Optimizers by group: what each keeps, and Muon's updates as orthogonal as they are said to be, on one device or 8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import GroupConfig, OptimizerConfig
from baichuan_omni_jax.train.muon import is_matrix, newton_schulz, orthogonal_stack
from baichuan_omni_jax.train.optimizers import learning_rates, make_optimizer
from tests.helpers.micro import run_on_devices

SHAPES = {
    "llm.layers.attention.q_proj.weight": (3, 128, 4, 64),
    "llm.layers.mlp.down_proj.weight": (3, 256, 128),
    "llm.layers.input_norm.scale": (3, 128),
    "llm.embedding": (200, 128),
    "llm.norm.scale": (128,),
}


def optimizer_of(kind: str, **changes):
    """An optimizer of one group of this kind, and parameters for it."""
    groups = (GroupConfig(name="all", pattern=".*", learning_rate=0.1, optimizer=kind),)
    config = OptimizerConfig(groups=groups, warmup_steps=0, decay_steps=1000, weight_decay=0.0, **changes)
    rng = np.random.default_rng(0)
    parameters = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    return config, make_optimizer(config, dict.fromkeys(SHAPES, "all")), parameters


def numbers_kept(kind: str, **changes) -> float:
    """How many bytes the state has for one of the parameters."""
    _, optimizer, parameters = optimizer_of(kind, **changes)
    state = jax.eval_shape(optimizer.init, parameters)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return kept / sum(value.size for value in parameters.values())


def test_what_each_keeps_of_a_parameter():
    assert numbers_kept("adamw") == pytest.approx(8, abs=0.01)
    assert numbers_kept("adamw", moments_dtype="bfloat16") == pytest.approx(4, abs=0.01)
    # One moment of matrices, two of the embedding and the norms.
    matrices = sum(np.prod(shape) for name, shape in SHAPES.items() if is_matrix(name))
    total = sum(np.prod(shape) for shape in SHAPES.values())
    assert numbers_kept("muon") == pytest.approx((4 * matrices + 8 * (total - matrices)) / total, abs=0.01)
    assert numbers_kept("adafactor") < 0.3


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_a_step_goes_downhill_and_has_the_rate_of_the_schedule(kind):
    config, optimizer, parameters = optimizer_of(kind)
    state = optimizer.init(parameters)
    rate = float(learning_rates(config, state)["all"])
    assert rate == pytest.approx(0.1)
    updates, state = jax.jit(optimizer.update)(parameters, state, parameters)  # the gradient of half the squares
    for name, update in updates.items():
        assert float((update * parameters[name]).sum()) < 0, name
        # About as large as AdamW's first, which is the rate; Muon's are a fifth of it.
        size = float(jnp.sqrt((update**2).mean()))
        assert 0.1 < size / rate < 1.1, name
    assert float(learning_rates(config, state)["all"]) < rate


def test_a_group_that_names_none_has_that_of_the_run():
    groups = (
        GroupConfig(name="tables", pattern="llm.embedding", learning_rate=0.1),
        GroupConfig(name="all", pattern=".*", learning_rate=0.1, optimizer="adamw"),
    )
    config = OptimizerConfig(groups=groups, optimizer="adafactor")
    labels = {name: "tables" if name == "llm.embedding" else "all" for name in SHAPES}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(make_optimizer(config, labels).init, shapes)[1].inner_states
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(each)) for name, each in state.items()}
    assert sizes["tables"] < 1000
    assert sizes["all"] > 2 * np.prod(SHAPES["llm.layers.mlp.down_proj.weight"])


@given(st.integers(1, 3), st.integers(2, 24), st.integers(0, 24), st.floats(-6, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_singular_values_become_nearly_one(layers, rows, more, exponent, seed):
    """Of matrices of any size and scale; tolerances are the polynomial's own, for values above 1e-2 of the norm."""
    x = np.random.default_rng(seed).standard_normal((layers, rows, rows + more)) * 10**exponent
    before = np.linalg.svd(x, compute_uv=False)
    found = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x, jnp.float32))), compute_uv=False)
    clear = before / np.linalg.norm(x, axis=(1, 2))[:, None] > 1e-2
    assert (found < 1.25).all()
    assert (found[clear] > 0.6).all()


def test_zeros_stay_zeros():
    assert not np.asarray(orthogonal_stack(jnp.zeros((2, 4, 3, 5)))).any()


@pytest.mark.parametrize("shape", [(2, 32, 4, 16), (2, 4, 16, 32), (3, 8, 40), (1, 40, 8)])
def test_heads_belong_to_the_side_that_makes_a_matrix_square(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    found = np.asarray(orthogonal_stack(jnp.asarray(x, jnp.float32)))
    rows = {(2, 32, 4, 16): 32, (2, 4, 16, 32): 64}.get(shape, shape[1])
    values = np.linalg.svd(found.reshape(shape[0], rows, -1), compute_uv=False)
    scale = 0.2 * np.sqrt(max(rows, found[0].size // rows))
    assert (np.abs(values / scale - 0.93) < 0.33).all()


def test_eight_devices_update_as_one(tmp_path):
    run_on_devices("optimizers.py", tmp_path / "xla")
