"""A training step over two TPU slices, compiled without a TPU: only `data` crosses from one to the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.proofs import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import dataclasses
import jax
from jax.experimental import topologies
from baichuan_omni_jax.config import Budgets, MeshConfig, OptimizerConfig, load_run_config, resolve_model
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.state import abstract_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compile_step

run = load_run_config("configs/micro.py")
data = dataclasses.replace(run.data, rows=4, budgets=Budgets(tokens=256, patches=0, audio_frames=0, audio_targets=0))
run = dataclasses.replace(run, branches=("llm",), data=data, optimizer=OptimizerConfig())
run = dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2, context=2, slices=2))
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
mesh, omni, compute = make_mesh(run.mesh, devices), resolve_model(run.model), make_compute(run)
assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
with jax.set_mesh(mesh):
    spec = make_step_spec(run, omni, mesh, compute)
    batch = abstract_batch(4, data.budgets, omni, run.branches, mesh, compute.rules)
    compiled = compile_step(spec).lower(abstract_state(spec), batch).compile()
print("temporaries", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_step_compiles_for_two_slices():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "temporaries" in done.stdout
