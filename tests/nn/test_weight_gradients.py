"""Gradients of weights under bf16 compute: what is summed over pieces and places is summed in fp32.

Expected values are the sums written out in float64, from the same bf16 inputs and the same bf16 activations: what is
left to differ is how the sum is carried. A bf16 sum over 16 pieces is off by about 1 %.
"""

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.llm.model import SwiGLU
from baichuan_omni_jax.nn.layers import TransposedConv1d
from baichuan_omni_jax.nn.linear import Linear, gather_weight, look_up
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, normal, with_values
from baichuan_omni_jax.nn.remat import map_chunks
from tests.helpers.micro import one_device

# Relative RMS of a gradient: of a sum in fp32, and where bf16 activations come from two programs.
SUM, LAYER = 1e-5, 3e-3
ROWS, LENGTH, PIECES = 2, 256, 16
BFLOAT = jnp.dtype("bfloat16")
COMPUTE = ComputePolicy(dtype=BFLOAT, mlp_chunk=LENGTH // PIECES)


def draw(seed: int, *shape: int) -> jax.Array:
    """Values around 0.5: their sums grow, and a bf16 sum loses what is added late."""
    return jax.random.uniform(jax.random.key(seed), shape).astype(BFLOAT)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def error(found: jax.Array, expected: np.ndarray) -> float:
    assert found.dtype == jnp.float32
    return float(np.sqrt(np.mean((wide(found) - expected) ** 2) / np.mean(expected**2)))


def gradient_of(function, module, dy: jax.Array) -> dict[str, jax.Array]:
    """The gradient by name of the sum of `function(module) * dy`, compiled."""

    def gradient(values, dy):
        loss = lambda values: (function(with_values(module, values)) * dy).sum(dtype=jnp.float32)  # noqa: E731
        return jax.grad(loss)(values)

    return jax.jit(gradient)(named_values(module), dy)


def test_a_linear_layer_in_pieces():
    """dW = x^T dy and db = sum of dy over all positions, of pieces that are added one after the other."""
    x, dy = draw(0, ROWS, LENGTH, 24), draw(1, ROWS, LENGTH, 32)
    with jax.set_mesh(one_device()):
        linear = Linear(
            jax.random.key(2),
            "btd,df->btf",
            (24, 32),
            ("embed", "mlp"),
            out=("batch", "length", "act_mlp"),
            compute=COMPUTE,
            bias=True,
        )

        def in_pieces(linear):
            weight = linear.gathered()
            return map_chunks(lambda piece: linear(piece, weight), x, COMPUTE.mlp_chunk, COMPUTE.rules)

        found = gradient_of(in_pieces, linear, dy)
    assert error(found["weight"], np.einsum("btd,btf->df", wide(x), wide(dy))) <= SUM
    assert error(found["bias"], wide(dy).sum((0, 1))) <= SUM


def test_the_mlp_in_pieces():
    """All three matrices of the SwiGLU MLP against its derivative written out, with bf16 activations."""
    cfg = LLMConfig(
        vocab_size=64, hidden_size=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=24, intermediate_size=96
    )
    x, dy = draw(0, ROWS, LENGTH, 48), draw(1, ROWS, LENGTH, 48)
    with jax.set_mesh(one_device()):
        mlp = SwiGLU(jax.random.key(2), cfg, COMPUTE)
        found = gradient_of(lambda mlp: mlp(x), mlp, dy)

    expected = mlp_gradients(mlp, x, dy)
    assert set(found) == set(expected)
    worst = {name: error(found[name], value) for name, value in expected.items()}
    assert max(worst.values()) <= LAYER, worst


def mlp_gradients(mlp: SwiGLU, x: jax.Array, dy: jax.Array) -> dict[str, np.ndarray]:
    """The gradients of the MLP's matrices: every activation rounded to bf16, every sum over positions in float64."""
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    gate, up, down = (wide(jnp.asarray(np.asarray(linear.weight[...])).astype(BFLOAT)) for linear in linears)
    g, u, dh = (
        jnp.asarray(value, jnp.float32).astype(BFLOAT) for value in (wide(x) @ gate, wide(x) @ up, wide(dy) @ down.T)
    )
    hidden, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)
    dg, du = pull(dh)
    return {
        "gate_proj.weight": np.einsum("btd,btf->df", wide(x), wide(dg)),
        "up_proj.weight": np.einsum("btd,btf->df", wide(x), wide(du)),
        "down_proj.weight": np.einsum("btf,btd->fd", wide(hidden), wide(dy)),
    }


def test_a_table_of_which_few_rows_are_read():
    """A row's gradient is the sum over the places that read it; in bf16 such a sum stops growing at 256 places."""
    rows, dy = jnp.arange(2048)[None] % 4, draw(0, 1, 2048, 16)
    with jax.set_mesh(one_device()):
        table = normal(jax.random.key(1), (8, 16), ("codes", "embed"))
        spec = COMPUTE.rules.spec("batch", "length", None)
        found = gradient_of(
            lambda tables: look_up(gather_weight(tables["table"], COMPUTE), rows, out=spec), {"table": table}, dy
        )
    expected = np.zeros((8, 16))
    np.add.at(expected, np.asarray(rows)[0], wide(dy)[0])
    assert error(found["table"], expected) <= SUM


def test_a_transposed_convolution():
    """Every output frame reads the bias; input frame i reaches output frames 2 i + k with weight k."""
    x, dy = draw(0, ROWS, 64, 8), draw(1, ROWS, 2 * 63 + 3, 12)
    with jax.set_mesh(one_device()):
        conv = TransposedConv1d(jax.random.key(2), (3, 8, 12), stride=2, rows="batch", compute=COMPUTE)
        found = gradient_of(lambda conv: conv(x), conv, dy)
    windows = np.stack([wide(dy)[:, k : k + 2 * 63 + 1 : 2] for k in range(3)], 2)
    assert error(found["weight"], np.einsum("btc,btkd->kcd", wide(x), windows)) <= SUM
    assert error(found["bias"], wide(dy).sum((0, 1))) <= SUM
