"""Mosaic compiles the attention kernels, forward and backward, at 64k tokens for TPUs that are not there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from hlo_moves import moved_bytes  # noqa: E402

# The benchmark's own functions, in a process of its own: libtpu wants its environment before JAX starts.
COMPILE = """
import jax.numpy as jnp
from attention_aot import P, TOPOLOGIES, compile_attention, gigabytes
from baichuan_omni_jax.kernels.flash_attention.cases import REAL
case = REAL["{name}"]
spec = P(None, "chips") if {context} else P("chips")
compiled = compile_attention(TOPOLOGIES["{chip}"], case.heads, case.length, case.block, spec=spec, dtype="{dtype}")
print("temporaries", gigabytes(compiled))
"""

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[preflight]'")
# A program with each kind of move: a copy, a fusion of only a copy, a copy-start that changes the layout; and what is
# none: a prefetch, a fusion that computes, a bitcast.
HLO = """
%only_moves (p: bf16[80,256]) -> bf16[80,256] {
  %p = bf16[80,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[80,256]{0,1:T(8,128)(2,1)} copy(%p)
}
%computes (p: bf16[80,256]) -> bf16[80,256] {
  %p = bf16[80,256]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.2 = bf16[80,256]{0,1:T(8,128)(2,1)} copy(%p)
  ROOT %add.1 = bf16[80,256]{0,1:T(8,128)(2,1)} add(%copy.2, %copy.2)
}
ENTRY %main (x: bf16[80,256]) -> bf16[80,256] {
  %x = bf16[80,256]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.3 = bf16[80,256]{0,1:T(8,128)(2,1)} copy(%x)
  %fusion.1 = bf16[80,256]{0,1:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%only_moves
  %fusion.2 = bf16[80,256]{0,1:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%computes
  %moved = (f32[8,128]{0,1:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %fetched = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  ROOT %bitcast.1 = bf16[80,256]{0,1:T(8,128)(2,1)} bitcast(%fusion.2)
}
"""


def temporaries(name: str, chip: str, *, dtype: str = "bfloat16", context: bool = False) -> float:
    """GB a chip, one row of 65536 tokens each; with `context` one row over all chips."""
    code = COMPILE.format(name=name, chip=chip, dtype=dtype, context=context)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", ["llm", "vit", "whisper"])
def test_compiles_for_every_chip_and_heads(name, chip):
    assert temporaries(name, chip) <= 2.4


@needs_libtpu
@pytest.mark.slow
def test_compiles_in_fp32():
    assert temporaries("llm", "v5p", dtype="float32") <= 4.8


@needs_libtpu
@pytest.mark.slow
def test_compiles_with_a_row_over_four_chips():
    assert temporaries("llm", "v5p", context=True) <= 2.4 / 3


def test_moves_are_counted_with_their_padding():
    """The copy and the fusion write 256 x 128 (80 rounded up to a tile) in bf16, the copy-start 8 x 128 rounded up."""
    assert moved_bytes(HLO) == 2 * 256 * 128 * 2 + 128 * 128 * 4
