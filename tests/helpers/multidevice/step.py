"""A packed multimodal batch's losses and gradients on meshes of 8 devices against one. Prints one line a mesh.

    step.py ROOT CODES data,fsdp,context,tensor[/PARTS[/WEIGHTING]] ...

PARTS is `train.accumulate`. WEIGHTING is `train.document_weighting`: loss and gradients are then compared with those of
every document alone on one device, weighted by hand. On a mesh with context > 1 the rows come dealt to the shards in
another order of tokens. Where fsdp and context are split, what the compiled program exchanges over `context` is checked
too, and of every mesh in `programs.json` what the program consists of. Run by test_step_mesh.py with
XLA_FLAGS=--xla_force_host_platform_device_count=8; exits 1 on a difference.
"""

import dataclasses
import math
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from baichuan_omni_jax.config import MeshConfig, resolve_model
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import MESH_AXES, make_mesh
from baichuan_omni_jax.train.losses import Denominators, omni_loss
from baichuan_omni_jax.train.preflight.hlo import Collective, collectives_of
from baichuan_omni_jax.train.state import StepSpec, TrainState, init_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compute_gradients
from tests.helpers.micro import micro_run, open_micro, place
from tests.helpers.multidevice.programs import check_table, program_table

# Compiling is nearly all of the time.
jax.config.update("jax_disable_most_optimizations", True)
# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-5
ROWS = 8
LOSSES = ("loss", "loss_text", "loss_audio", *(f"loss_audio_q{level}" for level in range(8)))
# Of the sources, where documents are weighted.
LOSS_WEIGHTS = (1.0, 0.5, 2.0, 3.0, 0.25)
SETTINGS = (
    f"data.rows={ROWS}",
    # Eight parts of 64 patches, the largest image.
    "data.budgets.patches=512",
    "data.budgets.text_targets=192",
    "data.media_shards=8",
    "data.context_block=16",
    "compute.attention_block=64",
    "compute.loss_chunk=64",
    "compute.remat=full",
)
# Softmax does not change when all scores of a query do, so the gradient of a key bias that is not rotated (audio head,
# vision) is 0 but for rounding: not compared.
ZERO = ("audio_head.head.layers.attention.k_proj.bias",)
# What may cross `context` besides weights: (kind, scope) and how often the program says it. In the language model's
# layers keys and values, gathered forward and again in remat; outside key ids and positions, media and their slots,
# hidden states of the audio head and theirs, and those of the text targets with these and, back, their entropies.
IN_LAYERS = {("all-gather", "gather_kv"): 4, ("reduce-scatter", "gather_kv"): 2}
OUTSIDE = {
    ("all-gather", "whole_keys"): 2,
    ("all-gather", "merge_media"): 3,
    ("reduce-scatter", "merge_media"): 2,
    ("all-gather", "pick_slots"): 4,
    ("reduce-scatter", "pick_slots"): 3,
}


def main() -> int:
    root, codes = map(Path, sys.argv[1:3])
    run = micro_run(root, *SETTINGS)
    omni = resolve_model(run.model)
    pipeline, store = open_micro(run, codes)
    batch = next(pipeline.steps(store)).batch
    assert batch["patch_segments"].any()
    assert batch["audio_codes"].any()
    assert batch["audio_weights"].any()
    # Alone with the logits of every token, on the meshes with those of the targets.
    whole = {name: value for name, value in batch.items() if name != "text_target_index"}
    one, values, _ = run_on((1, 1, 1, 1), run, omni, whole, None)
    failed = False
    for text in sys.argv[3:]:
        sizes, parts, weighting = (*text.split("/"), "", "")[:3]
        sizes = tuple(map(int, sizes.split(",")))
        if weighting:
            failed |= not check_weighting(sizes, int(parts), weighting, run, omni, pipeline, store, values)
            continue
        changed = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=int(parts or 1)))
        dealt = next(pipeline.steps(store, context_shards=sizes[2])).batch
        many, _, program = run_on(sizes, changed, omni, dealt, values)
        distances = {name: distance(many[name], one[name]) for name in one if not name.endswith(ZERO)}
        name = max(distances, key=distances.get)
        print(f"{text}: {len(distances)} arrays, largest difference {distances[name]:.1e} ({name})", flush=True)
        failed |= not distances[name] <= TOLERANCE
        if min(sizes[1:3]) > 1:
            failed |= not check_exchanges(*program)
        failed |= not check_table(text, program_table(*program[:2]))
    return int(failed)


def check_weighting(sizes, parts, weighting, run, omni, pipeline, store, values) -> bool:
    """Whether documents weighted by the host give on this mesh what each gives alone, weighted by hand."""
    mixture = [
        dataclasses.replace(each, loss_weight=LOSS_WEIGHTS[place]) for place, each in enumerate(run.data.mixture)
    ]
    config = dataclasses.replace(run.data, mixture=tuple(mixture))
    run = dataclasses.replace(run, data=config, train=dataclasses.replace(run.train, accumulate=parts))
    weighed = dataclasses.replace(pipeline, config=config, weighting=weighting)
    batch = next(weighed.steps(store, context_shards=sizes[2])).batch
    found, _, _ = run_on(sizes, run, omni, batch, values)
    keys = [key for row in next(pipeline.step_plan()) for key in row]
    expected = one_by_one(run, omni, pipeline, store, keys, values, {"sqrt": 0.5, "document": 1.0}[weighting])
    distances = {name: distance(found[name], expected[name]) for name in expected if not name.endswith(ZERO)}
    name = max(distances, key=distances.get)
    print(f"{sizes}/{parts}/{weighting}: {len(keys)} documents, largest difference {distances[name]:.1e} ({name})")
    return distances[name] <= TOLERANCE


def one_by_one(run, omni, pipeline, store, keys, values, power) -> dict[str, np.ndarray]:
    """Loss and gradients as sums, in fp64, over documents alone in a row, their weights made here in numpy."""
    rows = [pipeline.decoder(store)([[key]])[0] for key in keys]
    factors = np.array([LOSS_WEIGHTS[source] for source, _ in keys])
    count = lambda name: np.array([(row[name] > 0).sum((0, 1)) for row in rows], np.float64)  # noqa: E731
    text, audio = count("text_weights"), count("audio_weights")
    weigh = lambda counts: (np.where(counts > 0, np.maximum(counts, 1) ** -power, 0).T * factors).T  # noqa: E731
    text_each, audio_each = weigh(text), weigh(audio)
    text_sum, audio_sum = (text_each * text).sum(), (audio_each * audio).sum(0)
    scale = min(1.0, audio_sum[0] / (run.train.audio_full_ratio * text_sum))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        spec = make_step_spec(run, omni, mesh, compute := make_compute(run))
        ones = Denominators(jnp.ones(()), jnp.ones(audio.shape[1]), jnp.ones(()), jnp.ones(len(run.data.mixture)))
        loss_of = lambda trainable, frozen, batch: omni_loss(spec.assemble(trainable, frozen), batch, run, ones)[0]  # noqa: E731
        gradient_of = jax.jit(jax.value_and_grad(loss_of))
        trainable, frozen = spec.split(
            {name: jax.device_put(values[name], each.sharding) for name, each in named_values(spec.template).items()}
        )
        total = {}
        for row, of_text, of_audio in zip(rows, text_each, audio_each, strict=True):
            row["text_weights"] = (row["text_weights"] * of_text / text_sum).astype(np.float32)
            row["audio_weights"] = (row["audio_weights"] * scale * of_audio / audio_sum).astype(np.float32)
            loss, gradients = gradient_of(trainable, frozen, place(row, mesh, compute.rules))
            arrays = {"loss": loss} | {f"gradient of {name}": value for name, value in gradients.items()}
            for name, value in arrays.items():
                total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def run_on(sizes, run, omni, batch, values):
    """Metrics and gradients as numpy arrays, the parameters (drawn on one device, then handed to every mesh), and what
    `check_exchanges` asks for."""
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        compute = make_compute(run)
        spec = make_step_spec(run, omni, mesh, compute)
        if values is None:
            state, _ = init_state(run, spec)
            values = jax.tree.map(np.asarray, state.trainable | state.frozen)
        placed = {
            name: jax.device_put(values[name], shape.sharding) for name, shape in named_values(spec.template).items()
        }
        arguments = (*spec.split(placed), place(batch, mesh, compute.rules))

        def gradients_and_losses(trainable, frozen, batch):
            gradients, metrics, _ = compute_gradients(TrainState(0, trainable, frozen), batch, spec)
            return gradients, {name: value for name, value in metrics.items() if name.split("/")[0] in LOSSES}

        compiled = jax.jit(gradients_and_losses).lower(*arguments).compile()
        gradients, metrics = compiled(*arguments)
    arrays = metrics | {f"gradient of {name}": value for name, value in gradients.items()}
    return jax.tree.map(np.asarray, arrays), values, (compiled.as_text(), mesh.shape, bytes_of_layer(spec, mesh))


def distance(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), 1e-30))


def check_exchanges(program: str, mesh_shape: dict[str, int], layer_bytes: int) -> bool:
    """Whether activations cross `context` as keys and values in the layers, once for media and audio head outside.

    Weights are stored split over `context` too: their gathers have a scope of their own, and their gradients are the
    all-reduces of the backward pass, which in the layers must have just their bytes.
    """
    across = [c for c in collectives_of(program, mesh_shape) if "context" in c.axes and "gather_weight" not in c.scope]
    layers = [c for c in across if re.search(r"jvp\(llm\)+/while/", c.scope)]
    # Sums of losses, and the gradients of what lies outside the layers.
    summed = [c for c in across if c.kind == "all-reduce"]
    outside = [c for c in across if c not in layers and c not in summed]
    reduced = [c for c in layers if c in summed]
    found = [Counter((c.kind, named(c)) for c in some if c not in reduced) for some in (layers, outside)]
    gradients = sum(c.bytes for c in reduced)
    print(f"  over context: {dict(found[0])} in the layers, {dict(found[1])} outside, gradients {gradients} B a layer")
    fits = all("transpose(" in c.scope for c in reduced) and gradients == layer_bytes
    return fits and found == [IN_LAYERS, OUTSIDE]


def named(collective: Collective) -> str:
    return next((name for _, name in (*IN_LAYERS, *OUTSIDE) if name in collective.scope), collective.scope)


def bytes_of_layer(spec: StepSpec, mesh: Mesh) -> int:
    """Bytes of one language model layer's parameters, fp32, of one tensor shard."""
    layers = {name: shape for name, shape in named_values(spec.template).items() if name.startswith("llm.layers.")}
    parts = lambda shape: mesh.shape["tensor"] if "tensor" in str(shape.sharding.spec) else 1  # noqa: E731
    return sum(4 * math.prod(shape.shape[1:]) // parts(shape) for shape in layers.values())


if __name__ == "__main__":
    sys.exit(main())
