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

# The benchmark's own functions, in a process of its own: libtpu wants its environment before JAX starts. A program
# compiles on one core, so two at a time.
COMPILE = """
from concurrent.futures import ThreadPoolExecutor
from attention_aot import P, TOPOLOGIES, compile_attention, gigabytes
from baichuan_omni_jax.kernels.flash_attention.cases import REAL

def temporaries(program):
    name, dtype, context = program
    case, spec = REAL[name], P(None, "chips") if context else P("chips")
    topology = TOPOLOGIES["{chip}"]
    return gigabytes(compile_attention(topology, case.heads, case.length, case.block, spec=spec, dtype=dtype))

with ThreadPoolExecutor(2) as pool:
    print("temporaries", *pool.map(temporaries, {programs}))
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


def temporaries(chip: str, *programs: tuple[str, str, bool]) -> list[float]:
    """GB a chip, one row of 65536 tokens each; a program is (case, dtype, whether one row lies over all chips)."""
    code = COMPILE.format(chip=chip, programs=programs)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [float(number) for number in done.stdout.rpartition("temporaries")[2].split()]
    assert len(found) == len(programs), done.stdout
    return found


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_compiles_for_every_chip_and_heads(chip):
    assert max(temporaries(chip, *((name, "bfloat16", False) for name in ("llm", "vit", "whisper")))) <= 2.4


@needs_libtpu
@pytest.mark.slow
def test_compiles_in_fp32_and_with_a_row_over_four_chips():
    single, context = temporaries("v5p", ("llm", "float32", False), ("llm", "bfloat16", True))
    assert single <= 4.8
    assert context <= 2.4 / 3


def test_moves_are_counted_with_their_padding():
    """The copy and the fusion write 256 x 128 (80 rounded up to a tile) in bf16, the copy-start 8 x 128 rounded up."""
    assert moved_bytes(HLO) == 2 * 256 * 128 * 2 + 128 * 128 * 4
