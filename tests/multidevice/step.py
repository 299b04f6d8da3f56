"""A packed multimodal batch's losses and gradients on meshes of 8 devices against one. Prints one line a mesh.

    step.py ROOT CODES data,fsdp,context,tensor[/PARTS] ...

PARTS is `train.accumulate`. On a mesh with context > 1 the rows come dealt to the shards in another order of tokens.
Where fsdp and context are split, what the compiled program exchanges over `context` is checked too.
Run by test_step_mesh.py with XLA_FLAGS=--xla_force_host_platform_device_count=8; exits 1 on a difference.
"""

import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from micro import micro_run, open_micro, place

from baichuan_omni_jax.config import MeshConfig, resolve_model
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import MESH_AXES, make_mesh
from baichuan_omni_jax.train.collectives import collectives_of
from baichuan_omni_jax.train.state import init_state, make_compute, make_setup
from baichuan_omni_jax.train.step import make_gradients
from data_pipelines.context_plan import ContextPlan

# Compiling is nearly all of the time.
jax.config.update("jax_disable_most_optimizations", True)
# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-5
ROWS, BLOCK = 8, 16
SETTINGS = (
    f"data.rows={ROWS}",
    # Eight parts of 64 patches, the largest picture.
    "data.budgets.patches=512",
    "data.media_shards=8",
    f"data.context_block={BLOCK}",
    "compute.attention_block=64",
    "compute.loss_chunk=64",
    "compute.remat=full",
)
# Softmax does not change when all scores of a query do, so the gradient of a key bias that is not rotated (audio head,
# vision) is 0 but for rounding: not compared.
ZERO = ("audio_head.head.layers.attention.k_proj.bias",)
# What may cross `context` and not `fsdp` (weights and their gradients cross both): (kind, scope) and how often.
IN_LAYERS = {("all-gather", "gather_kv"): 4, ("reduce-scatter", "gather_kv"): 2}  # 2 forward, 2 again in remat
OUTSIDE = ("whole_keys", "merge_media", "pick_slots")


def main() -> int:
    root, codes = map(Path, sys.argv[1:3])
    run = micro_run(root, *SETTINGS)
    omni = resolve_model(run.model)
    pipeline, store = open_micro(run, codes)
    batch = next(pipeline.steps(store)).batch
    assert batch["patch_segments"].any()
    assert batch["audio_codes"].any()
    assert batch["audio_weights"].any()
    one, values, _ = run_on((1, 1, 1, 1), run, omni, batch, None)
    failed = False
    for text in sys.argv[3:]:
        sizes, _, parts = text.partition("/")
        sizes = tuple(map(int, sizes.split(",")))
        changed = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=int(parts or 1)))
        dealt = ContextPlan(sizes[2], BLOCK).deal(batch)
        many, _, program = run_on(sizes, changed, omni, dealt, values)
        distances = {name: distance(many[name], one[name]) for name in one if not name.endswith(ZERO)}
        name = max(distances, key=distances.get)
        print(f"{text}: {len(distances)} arrays, largest difference {distances[name]:.1e} ({name})", flush=True)
        failed |= not distances[name] <= TOLERANCE
        if min(sizes[1:3]) > 1:
            failed |= not check_exchanges(program, dict(zip(MESH_AXES, sizes, strict=True)))
    return int(failed)


def run_on(sizes, run, omni, batch, values):
    """Metrics and gradients as numpy arrays, the parameters (drawn on one device, then handed to every mesh), HLO."""
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
        arguments = (*setup.split(placed), place(batch, mesh, compute.rules))
        compiled = jax.jit(make_gradients(setup, run)).lower(*arguments).compile()
        gradients, metrics = compiled(*arguments)
    arrays = metrics | {f"gradient of {name}": value for name, value in gradients.items()}
    return jax.tree.map(np.asarray, arrays), values, compiled.as_text()


def distance(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), 1e-30))


def check_exchanges(program: str, mesh_shape: dict[str, int]) -> bool:
    """Whether activations cross `context` as keys and values in the layers, once for media and audio head outside."""
    across = [c for c in collectives_of(program, mesh_shape) if "context" in c.axes and "fsdp" not in c.axes]
    names = (*OUTSIDE, "gather_kv")
    scoped = [(next((name for name in names if f"{name}/" in c.scope), c.scope), c) for c in across]
    layers = [(scope, c) for scope, c in scoped if scope not in OUTSIDE]
    found = Counter((c.kind, scope) for scope, c in layers)
    media = {name: sum(scope == name and is_forward(c) for scope, c in scoped) for name in OUTSIDE}
    print(f"  over context in the layers: {dict(found)}; forward, outside: {media}", flush=True)
    return found == IN_LAYERS and all(c.loops for _, c in layers)


def is_forward(collective) -> bool:
    return "transpose(" not in collective.scope


if __name__ == "__main__":
    sys.exit(main())
