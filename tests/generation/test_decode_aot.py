"""The engine's programs, compiled for TPUs that are not there, from shapes alone."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from baichuan_omni_jax.config import tiny
from tests.helpers.proofs import HANG

ROOT = Path(__file__).parents[2]
SLOTS, CHUNK = 8, 128
# The benchmark's own functions, in a process of its own: libtpu wants its environment before JAX starts.
COMPILE = f"""
import json
import jax
from decode_aot import Sizes, lower_decode_steps, lower_prefill, traffic
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.preflight import devices_of

mesh = make_mesh(MeshConfig(data=2, tensor=2), devices_of("v5e:2x2"))
with jax.set_mesh(mesh):
    sizes = Sizes({SLOTS}, 256, {CHUNK}, "bfloat16")
    burst, read = (lower(tiny(), mesh, sizes) for lower in (lower_decode_steps, lower_prefill))
    text = read.as_text()
    print(json.dumps({{
        "kernel": "tpu_custom_call" in text,
        "bits": "ui16" in burst.as_text() or "ui16" in text,
        "item": traffic(burst.compile().as_text(), mesh)[0],
    }}))
    read.compile()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[preflight]'")
def test_programs_compile_for_a_mesh_of_tpus():
    """Reading uses the attention kernel, nothing copies tables as bits, and no weight travels for an item."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernel"]
    assert not found["bits"]
    cfg, rows = tiny().llm, SLOTS // 2
    # Two sums a layer over the halves of `tensor`, in fp32 at most, the logits, and flags.
    assert found["item"] <= 4 * rows * (2 * cfg.num_layers * cfg.hidden_size + cfg.vocab_size) + 256
