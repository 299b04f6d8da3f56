"""Updates of split parameters on 8 devices against one, of each optimizer. Exits 1 on a difference.

Run by test_optimizers.py with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_omni_jax.config import GroupConfig, MeshConfig, OptimizerConfig
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.optimizers import make_optimizer

EMBED = ("fsdp", "context")
# Five layers on 8 devices: some of them have none.
PARAMETERS = {
    "llm.layers.attention.q_proj.weight": ((5, 128, 4, 64), P(None, EMBED, "tensor", None)),
    "llm.layers.mlp.gate_proj.weight": ((5, 128, 256), P(None, EMBED, "tensor")),
    "llm.layers.input_norm.scale": ((5, 128), P(None, EMBED)),
    "llm.embedding": ((256, 128), P("tensor", EMBED)),
}
TOLERANCE = 1e-5  # of the largest update, fp32


def main() -> int:
    rng = np.random.default_rng(0)
    values, gradients = (
        {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in PARAMETERS.items()} for _ in "ab"
    )
    failed = False
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2), jax.devices())
    place = lambda tree: {name: jax.device_put(x, NamedSharding(mesh, PARAMETERS[name][1])) for name, x in tree.items()}  # noqa: E731
    for kind in ("adamw", "adafactor", "muon"):
        group = GroupConfig(name="all", pattern=".*", learning_rate=0.1, optimizer=kind)
        config = OptimizerConfig(groups=(group,), warmup_steps=0, decay_steps=10)
        optimizer = make_optimizer(config, dict.fromkeys(PARAMETERS, "all"), 0.1)
        one, _ = two_updates(optimizer, values, gradients)
        with jax.set_mesh(mesh):
            many, kept = two_updates(optimizer, place(values), place(gradients))
        for name, update in many.items():
            distance = np.abs(np.asarray(update) - np.asarray(one[name])).max() / np.abs(np.asarray(one[name])).max()
            print(f"{kind} {name}: {distance:.1e}")
            failed |= not distance <= TOLERANCE
        # A state that came back placed in another way would make a second program.
        failed |= not kept
    return int(failed)


def two_updates(optimizer, values, gradients):
    """The second update, and whether the state lies as it did before it."""
    state = jax.jit(optimizer.init)(values)
    update = jax.jit(optimizer.update)
    _, first = update(gradients, state, values)
    changes, second = update(gradients, first, values)
    places = [[leaf.sharding for leaf in jax.tree.leaves(each)] for each in (state, first, second)]
    return changes, places[0] == places[1] == places[2]


if __name__ == "__main__":
    sys.exit(main())
