"""A packed multimodal batch's losses and gradients on meshes of 8 devices against one. Prints one line a mesh.

    step.py ROOT CODES data,fsdp,context,tensor ...

Run by test_step_mesh.py with XLA_FLAGS=--xla_force_host_platform_device_count=8; exits 1 on a difference.
"""

import math
import sys
from pathlib import Path

import jax
import numpy as np
from micro import micro_run, open_micro, place

from baichuan_omni_jax.config import MeshConfig, resolve_model
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import MESH_AXES, make_mesh
from baichuan_omni_jax.train.state import init_state, make_compute, make_setup
from baichuan_omni_jax.train.step import omni_loss

# Compiling is nearly all of the time.
jax.config.update("jax_disable_most_optimizations", True)
# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-5
ROWS = 8
# Softmax does not change when all scores of a query do, so the gradient of a key bias that is not rotated (audio head,
# vision) is 0 but for rounding: not compared.
ZERO = ("audio_head.head.layers.attention.k_proj.bias",)


def main() -> int:
    root, codes = map(Path, sys.argv[1:3])
    run = micro_run(root, f"data.rows={ROWS}", "compute.attention_block=64", "compute.loss_chunk=64")
    omni = resolve_model(run.model)
    pipeline, store = open_micro(run, codes)
    batch = next(pipeline.steps(store)).batch
    assert batch["patch_segments"].any()
    assert batch["audio_codes"].any()
    assert batch["audio_weights"].any()
    one, values = run_on((1, 1, 1, 1), run, omni, batch, None)
    failed = False
    for text in sys.argv[3:]:
        many, _ = run_on(tuple(map(int, text.split(","))), run, omni, batch, values)
        distances = {name: distance(many[name], one[name]) for name in one if not name.endswith(ZERO)}
        name = max(distances, key=distances.get)
        print(f"{text}: {len(distances)} arrays, largest difference {distances[name]:.1e} ({name})", flush=True)
        failed |= not distances[name] <= TOLERANCE
    return int(failed)


def run_on(sizes, run, omni, batch, values):
    """Metrics and gradients as numpy arrays, and the parameters (drawn on one device, then handed to every mesh)."""
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        compute = make_compute(run)
        setup = make_setup(run, omni, mesh, compute)
        if values is None:
            state = init_state(run, omni, setup, compute)
            values = jax.tree.map(np.asarray, state.trainable | state.frozen)
        placed = {
            name: jax.device_put(values[name], shape.sharding) for name, shape in named_values(setup.template).items()
        }
        trainable, frozen = setup.split(placed)
        loss = lambda trainable, batch: omni_loss(setup.assemble(trainable, frozen), batch, run)  # noqa: E731
        gradients, metrics = jax.jit(jax.grad(loss, has_aux=True))(trainable, place(batch, mesh, compute.rules))
    arrays = metrics | {f"gradient of {name}": value for name, value in gradients.items()}
    return jax.tree.map(np.asarray, arrays), values


def distance(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), 1e-30))


if __name__ == "__main__":
    sys.exit(main())
