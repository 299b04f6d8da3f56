"""int8 products of a SwiGLU MLP in pieces on 8 devices against one. Exits 1 on a difference.

Run by test_int8.py with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.llm.model import SwiGLU
from baichuan_omni_jax.nn.int8 import Dither
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh, parameter_sharding

CONFIG = LLMConfig(
    vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=96
)
ROWS, LENGTH = 4, 32
TOLERANCE = 1e-5  # of a weight's gradient, relative to its largest value


def main() -> int:
    one = layer_on(MeshConfig(), chunk=0)
    failed = False
    for sizes in ((2, 2, 2), (1, 4, 2), (4, 2, 1)):
        many = layer_on(MeshConfig(**dict(zip(("fsdp", "context", "tensor"), sizes, strict=True))), chunk=4)
        for name, expected in one.items():
            worst = np.abs(many[name] - expected).max() / np.abs(expected).max()
            # Sums of whole numbers are exact: only a weight's gradient is a sum of fp32 numbers.
            wrong = worst > TOLERANCE if "weight" in name else not np.array_equal(many[name], expected)
            print(f"{sizes} {name}: {worst:.1e}{' WRONG' if wrong else ''}")
            failed |= bool(wrong)
    return int(failed)


def layer_on(config: MeshConfig, chunk: int) -> dict[str, np.ndarray]:
    """The MLP's output and gradients, with gradients rounded by chance, jitted on the mesh."""
    devices = config.data * config.fsdp * config.context * config.tensor
    mesh, compute = make_mesh(config, jax.devices()[:devices]), ComputePolicy(int8=True, mlp_chunk=chunk)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((ROWS, LENGTH, CONFIG.hidden_size)).astype(np.float32) for _ in "ab")
    with jax.set_mesh(mesh):
        mlp = SwiGLU(jax.random.key(0), CONFIG, compute)
        variables = named_variables(mlp)
        values = {
            name: jax.device_put(value, parameter_sharding(mesh, compute.rules, variables[name], name))
            for name, value in named_values(mlp).items()
        }
        x, dy = (jax.device_put(each, compute.spec("batch", "length", None)) for each in (x, dy))

        def of(values, x, dy):
            dither = Dither.draw(jax.random.key(1), ROWS, LENGTH, compute)
            y, pull = jax.vjp(lambda values, x: with_values(mlp, values)(x, dither), values, x)
            gradients, dx = pull(dy)
            return {"y": y, "dx": dx} | gradients

        found = jax.jit(of)(values, x, dy)
    return {name: np.asarray(jnp.asarray(value)) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
