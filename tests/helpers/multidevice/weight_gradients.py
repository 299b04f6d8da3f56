"""Weight gradients under bf16 compute on eight CPU devices: every sum over devices is one of fp32 numbers.

    weight_gradients.py MESH ...      as in 2,2,2,1: data, fsdp, context, tensor

First each matrix of a language model's layer against the sum in float64, the MLP in 16 pieces, from the same bf16
inputs. Then the reductions of a whole step's gradients, in the program as it leaves the partitioner: later, XLA for CPU
widens bf16 sums itself, which a TPU does not. Last, rows of special tokens that train in frozen tables: their gradients
and what is saved, against one device, fp32. Exits 1 on a difference.
"""

import dataclasses
import math
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from baichuan_omni_jax.config import (
    Budgets,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    load_run_config,
    resolve_model,
)
from baichuan_omni_jax.config.stages import TEXT_ENDS
from baichuan_omni_jax.llm.model import DecoderLayer
from baichuan_omni_jax.nn.param import ComputePolicy, named_values
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.sharding import MESH_AXES, make_mesh
from baichuan_omni_jax.train.state import TrainState, init_state, make_compute, make_step_spec, to_checkpoint
from baichuan_omni_jax.train.step import compute_gradients
from tests.helpers.micro import CONFIG
from tests.nn.test_weight_gradients import BFLOAT, LAYER, SUM, draw, error, gradient_of, mlp_gradients, wide

# Compiling is nearly all of the time.
jax.config.update("jax_disable_most_optimizations", True)
# A program from the cache is not compiled, so nothing of it could be read.
jax.config.update("jax_enable_compilation_cache", False)
ROWS, TOKENS, PIECES = 8, 256, 16
# As `%all-reduce.1 = bf16[128,320]{1,0} all-reduce(`; the result may be a tuple.
REDUCTION = re.compile(r"= (?P<result>.*?) (?:all-reduce|reduce-scatter)\(.*op_name=\"(?P<scope>[^\"]*)")
# Of keys and values over `context`, and of products split over `tensor`, forward and backward: no weight's gradient.
ACTIVATION = re.compile(r"gather_kv|->bt")


def main() -> int:
    failed = False
    for text in sys.argv[1:]:
        sizes = tuple(map(int, text.split(",")))
        mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), jax.devices()[: math.prod(sizes)])
        with jax.set_mesh(mesh):
            sums, mlp = errors_of_layer(sizes[2])
            reductions = reductions_of_step(mesh)
        narrow = [scope for result, scope in reductions if "bf16" in result and not ACTIVATION.search(scope)]
        weights = [scope for _, scope in reductions if "transpose(" in scope]
        print(f"{text}: sums {max(sums.values()):.1e}, MLP {max(mlp.values()):.1e}; {len(weights)} of", end=" ")
        print(f"{len(reductions)} reductions are the backward pass's, {len(narrow)} narrow: {narrow[:3]}", flush=True)
        failed |= max(sums.values()) > SUM or max(mlp.values()) > LAYER or not weights or bool(narrow)
        failed |= not rows_equal_one_device(mesh)
    return int(failed)


def errors_of_layer(context: int) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the attention's projections, with their biases, and of the MLP's matrices."""
    compute = ComputePolicy(dtype=BFLOAT, mlp_chunk=TOKENS // PIECES // context)
    layer = jax.jit(lambda: DecoderLayer(jax.random.key(2), resolve_model("tiny").llm, compute))()
    place = lambda value, *names: reshard(value, compute.rules.spec("batch", "length", *names))  # noqa: E731
    sums = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(layer.attention, name)
        into, out = linear.equation.split("->")[0].split(",")[0], linear.equation.split("->")[1]
        sizes = dict(zip(linear.equation.split("->")[0].split(",")[1], linear.weight.shape, strict=True))
        x, dy = (draw(seed, ROWS, TOKENS, *(sizes[a] for a in axes[2:])) for seed, axes in enumerate((into, out)))
        x, dy = place(x, *(["act_heads", None] if name == "o_proj" else [None])), place(dy, *linear.out[2:])
        found = gradient_of(lambda linear, x=x: linear(x), linear, dy)
        letters = linear.equation.split("->")[0].split(",")[1]
        sums[name] = error(whole(found["weight"]), np.einsum(f"{into},{out}->{letters}", wide(x), wide(dy)))
        if "bias" in found:
            sums[f"{name} bias"] = error(whole(found["bias"]), wide(dy).sum((0, 1)))
    width = resolve_model("tiny").llm.hidden_size
    x, dy = (place(draw(seed, ROWS, TOKENS, width), None) for seed in (0, 1))
    found = gradient_of(lambda mlp: mlp(x), layer.mlp, dy)
    expected = mlp_gradients(layer.mlp, whole(x), whole(dy))
    return sums, {name: error(whole(found[name]), value) for name, value in expected.items()}


def rows_equal_one_device(mesh) -> bool:
    """Gradients of special tokens' rows to 1e-5 of each array's largest value; saved parameters bit for bit."""
    single = make_mesh(MeshConfig(), jax.devices()[:1])
    (found, saved), (expected, reference) = rows_on(mesh), rows_on(single)
    worst = max(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected)
    same = all(np.array_equal(saved[name], reference[name]) for name in reference)
    print(f"  rows of special tokens: {len(expected)} gradients, worst {worst:.1e}; saved alike: {same}", flush=True)
    return worst <= 1e-5 and same


def rows_on(mesh) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients, and the parameters that a checkpoint of step 0 holds."""
    run = language_run(dtype="float32", loss_chunk=64, attention_block=32)
    groups = (
        GroupConfig(name="rows", pattern=TEXT_ENDS, learning_rate=1e-3, special_tokens_only=True),
        GroupConfig(name="frozen", pattern=".*", learning_rate=None),
    )
    run = dataclasses.replace(
        run,
        optimizer=OptimizerConfig(groups=groups),
        train=dataclasses.replace(run.train, frozen_dtype="bfloat16"),
    )
    rng, omni = np.random.default_rng(0), resolve_model(run.model)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        spec = make_step_spec(run, omni, mesh, make_compute(run))
        state, originals = init_state(run, spec)
        shapes = abstract_batch(run.data.rows, run.data.budgets, omni, run.branches, mesh, make_compute(run).rules)
        # All special tokens are among the first ids.
        values = {name: rng.integers(30, 62, shape.shape) for name, shape in shapes.items() if "t" in name}
        values |= {"positions": np.tile(np.arange(TOKENS), (run.data.rows, 1)), "segment_ids": np.ones(1)}
        values |= {"text_weights": np.ones(1), "document_ids": np.zeros(1), "source_ids": np.zeros(1)}
        batch = {
            name: jax.device_put(np.broadcast_to(values[name], shape.shape).astype(shape.dtype), shape.sharding)
            for name, shape in shapes.items()
        }
        gradients, _, _ = jax.jit(partial(compute_gradients, spec=spec))(state, batch)
        saved = named_values(to_checkpoint(spec, state, originals)[0])
    return jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, saved)


def whole(x: jax.Array) -> jax.Array:
    return reshard(x, P(*[None] * x.ndim))


def reductions_of_step(mesh) -> list[tuple[str, str]]:
    """(result, scope) of every sum over devices in the gradients of the micro run's language model, in two parts."""
    run = language_run(dtype="bfloat16", loss_chunk=64, attention_block=32, mlp_chunk=16)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=2))
    omni, compute = resolve_model(run.model), make_compute(run)
    spec = make_step_spec(run, omni, mesh, compute)
    batch = abstract_batch(run.data.rows, run.data.budgets, omni, run.branches, mesh, compute.rules)
    arguments = (*spec.split(spec.shapes()), batch)
    with tempfile.TemporaryDirectory() as folder:

        def gradients(trainable, frozen, batch):
            return compute_gradients(TrainState(0, trainable, frozen), batch, spec).by_name

        lowered = jax.jit(gradients).lower(*arguments)
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        lowered.compile(compiler_options=dump)
        text = "\n".join(path.read_text() for path in Path(folder).glob("*after_spmd-partitioning*"))
    return [(match["result"], match["scope"]) for match in map(REDUCTION.search, text.splitlines()) if match]


def language_run(**compute) -> RunConfig:
    """Micro, the language model alone on `2 * ROWS` rows."""
    run = load_run_config(CONFIG)
    budgets = Budgets(tokens=TOKENS, patches=0, audio_frames=0, audio_targets=0)
    return dataclasses.replace(
        run,
        branches=("llm",),
        optimizer=OptimizerConfig(),
        data=dataclasses.replace(run.data, rows=2 * ROWS, budgets=budgets),
        compute=dataclasses.replace(run.compute, **compute),
    )


if __name__ == "__main__":
    sys.exit(main())
