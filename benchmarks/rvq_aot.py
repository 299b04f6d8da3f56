"""Does the residual lookup compile for TPUs at the released sizes, without ever holding rows x codes in HBM?

    pip install -e '.[preflight]' && python benchmarks/rvq_aot.py [--rows 16384] [--json]

Compiled ahead of time, without a TPU, through the public `rvq_lookup` on a mesh of each topology's devices: rows split
over all of them, codebooks on each. A device's temporary HBM is read at `--rows` rows a device and at four times that.
Where scores lay in HBM it would grow fourfold; the goal is that it does not grow at all: 1 % is allowed.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rows import emit, row

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from baichuan_omni_jax.kernels.rvq_lookup.reference import RELEASED
from baichuan_omni_jax.sharding import make_mesh

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MIB = 2**20


def temporary_bytes(topology: str, rows: int) -> int:
    """A device's temporary HBM for `rows` rows a device. Raises where the kernel is not in the program."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    with jax.set_mesh(mesh):
        split, whole = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P(None, None))
        x = jax.ShapeDtypeStruct((rows * len(devices), RELEASED.width), jnp.bfloat16, sharding=split)
        codebooks = [
            jax.ShapeDtypeStruct((size, RELEASED.width), jnp.float32, sharding=whole) for size in RELEASED.sizes
        ]
        lookup = jax.jit(lambda x, codebooks: rvq_lookup(x, codebooks, implementation="pallas_tpu"))
        lowered = lookup.lower(x, codebooks)
    if "tpu_custom_call" not in lowered.as_text():
        raise RuntimeError(f"{topology}: the program holds no Mosaic kernel")
    return lowered.compile().memory_analysis().temp_size_in_bytes


def measure(chip: str, rows: int) -> dict:
    start = time.time()
    few, many = (temporary_bytes(TOPOLOGIES[chip], n) for n in (rows, 4 * rows))
    scores = 4 * rows * max(RELEASED.sizes) * 4
    return row(
        f"rvq_aot_{chip}",
        many / few,
        f"x the temporary HBM at {rows} rows a device for {4 * rows}",
        goal="<= 1.01",
        ok=many <= 1.01 * few,
        note=f"{few / MIB:.0f} MiB at {rows} rows, {many / MIB:.0f} MiB at {4 * rows}, where the scores of the "
        f"largest codebook alone would be {scores / MIB:.0f}; codebooks {'/'.join(map(str, RELEASED.sizes))} of width "
        f"{RELEASED.width}, {TOPOLOGIES[chip]}; compiled in {time.time() - start:.0f} s",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384, help="a device; more than the kernel's BLOCK_ROWS, 8192")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    return emit([measure(chip, args.rows) for chip in args.chips], args.json)


if __name__ == "__main__":
    sys.exit(main())
