"""Does the released-size language model's training step at 64k fit a TPU slice? Compiled ahead of time, without a TPU.

    pip install -e '.[preflight]' && python benchmarks/llm_step_aot.py [--topology v5p:4x4x4] [--context 4] [--json]

The step is the project's own model, attention (XLA implementation), chunked loss and AdamW with fp32 master weights.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from baichuan_omni_jax.config import MeshConfig, baichuan_omni_7b
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import Compute, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh, parameter_sharding
from baichuan_omni_jax.train.losses import chunked_cross_entropy

GIB = 2**30


def abstract_model(mesh, compute):
    model = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), baichuan_omni_7b().llm, compute))
    place = lambda name, v: jax.ShapeDtypeStruct(  # noqa: E731
        v.shape, v.dtype, sharding=parameter_sharding(mesh, compute.rules, v, name)
    )
    return with_values(model, {name: place(name, v) for name, v in named_variables(model).items()})


def make_step(compute, optimizer, chunk):
    def loss(model, batch):
        hidden = model(model.embed(batch["tokens"]), batch["positions"], batch["segment_ids"])
        total = chunked_cross_entropy(
            hidden, model.head_weight(), batch["text_targets"], batch["text_weights"], chunk=chunk, rules=compute.rules
        )
        return total / batch["text_weights"].sum()

    def step(model, state, batch):
        value, gradients = jax.value_and_grad(loss)(model, batch)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    return step


def measure(topology: str, context: int, length: int, chunk: int) -> dict:
    start = time.time()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=len(devices) // context, context=context), devices)
    compute = Compute(dtype=jnp.dtype("bfloat16"), mlp_chunk=chunk)
    with jax.set_mesh(mesh):
        model = abstract_model(mesh, compute)
        optimizer = optax.adamw(1e-5)
        state = jax.eval_shape(optimizer.init, model)
        row = NamedSharding(mesh, compute.rules.spec("batch", "length"))
        rows = len(devices) // context
        batch = {
            name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=row)
            for name, dtype in (
                ("tokens", "int32"),
                ("positions", "int32"),
                ("segment_ids", "int32"),
                ("text_targets", "int32"),
                ("text_weights", "float32"),
            )
        }
        step = jax.jit(make_step(compute, optimizer, chunk), donate_argnums=(0, 1))
        memory = step.lower(model, state, batch).compile().memory_analysis()
    temporaries = memory.temp_size_in_bytes / GIB
    return {
        "name": "llm_step_aot",
        "value": round(temporaries, 2),
        "unit": "GiB of temporaries a chip",
        "peer": None,
        "peer_value": None,
        "ratio": None,
        "goal": "<= 8",
        "ok": temporaries <= 8,
        "note": f"{topology}, fsdp {rows} x context {context}, {length} tokens, arguments "
        f"{memory.argument_size_in_bytes / GIB:.2f} GiB, {time.time() - start:.0f} s to compile, jax {jax.__version__}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    row = measure(args.topology, args.context, args.length, args.chunk)
    print(json.dumps(row) if args.json else "\n".join(f"{key:12} {value}" for key, value in row.items()))
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
