"""How much memory does the released-size language model's training step at 64k take? Compiled without a TPU.

    pip install -e '.[preflight]' && python benchmarks/llm_step_aot.py [--topology v5p:4x4x4] [--context 4] [--json]

The step is that of `configs/llm_64k_probe.py`: the project's own model, attention, chunked loss and AdamW with fp32
master weights, one row a group of `--context` chips. The peer's figure was measured at the same settings, full remat.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from rows import emit, row

from baichuan_omni_jax.config import MeshConfig, RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.state import abstract_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compile_step

GIB = 2**30
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llm_64k_probe.py"
# MaxText 0.2.5, qwen2.5-7b, v5p:4x4x4.
PEER, PEER_TEMPORARIES = "MaxText 0.2.5", 13.70


def compile_for(run: RunConfig, devices: list) -> jax.stages.Compiled:
    """The training step of `run` for `devices` of a topology."""
    omni, mesh, compute = resolve_model(run.model), make_mesh(run.mesh, devices), make_compute(run)
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        batch = abstract_batch(run.data.rows, run.data.budgets, omni, run.branches, mesh, compute.rules)
        return compile_step(spec).lower(abstract_state(spec), batch).compile()


def measure(topology: str, context: int, length: int) -> dict:
    start, run = time.time(), load_run_config(CONFIG)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    rows = len(devices) // context
    budgets = dataclasses.replace(run.data.budgets, tokens=length)
    run = dataclasses.replace(
        run,
        mesh=MeshConfig(fsdp=rows, context=context),
        data=dataclasses.replace(run.data, rows=rows, budgets=budgets),
    )
    memory = compile_for(run, devices).memory_analysis()
    temporaries = memory.temp_size_in_bytes / GIB
    return row(
        "llm_step_aot",
        temporaries,
        "GiB of temporaries a chip",
        peer=PEER,
        peer_value=PEER_TEMPORARIES,
        ratio=PEER_TEMPORARIES / temporaries,
        goal="<= 6",
        ok=temporaries <= 6,
        note=f"{topology}, fsdp {rows} x context {context}, {length} tokens, arguments "
        f"{memory.argument_size_in_bytes / GIB:.2f} GiB, {time.time() - start:.0f} s to compile, jax {jax.__version__}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    return emit([measure(args.topology, args.context, args.length)], args.json)


if __name__ == "__main__":
    sys.exit(main())
