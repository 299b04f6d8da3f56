"""What the compiled step of the micro run consists of, on 8 CPU devices, held against a table that is kept.

`programs.json` has collectives by kind and mesh axes (runs a step, bytes), FLOPs of matrix products and bytes of
copies, as one version of jax compiles them. A change shows as lines `mesh: what: before -> after`. When it is meant:

    OMNI_WRITE_PROGRAMS=1 python -m pytest tests/multidevice/test_step_mesh.py -m slow
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import jax

from baichuan_omni_jax.train.preflight.hlo import collectives_of
from baichuan_omni_jax.train.preflight.hlo_work import copied_bytes, products_of

FILE = Path(__file__).with_name("programs.json")


def program_table(program: str, mesh_shape: dict[str, int]) -> dict[str, int]:
    """Counts what a program does in a step on one device, read off its text: the same on any machine."""
    found: dict[str, int] = defaultdict(int)
    for one in collectives_of(program, mesh_shape):
        name = f"{one.kind} over {', '.join(one.axes)}"
        found[f"{name}, runs"] += one.times
        found[f"{name}, bytes"] += one.times * one.bytes
    found["matrix products, FLOPs"] = sum(each.flops * each.times for each in products_of(program))
    found["copies, bytes"] = copied_bytes(program)
    return dict(sorted(found.items()))


def check_table(mesh: str, table: dict[str, int]) -> bool:
    """Compares with what is kept, or keeps it where that is asked for; prints every difference."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"jax": jax.__version__, "programs": {}}
    if os.environ.get("OMNI_WRITE_PROGRAMS"):
        kept = {"jax": jax.__version__, "programs": kept["programs"] | {mesh: table}}
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        return True
    # Another version compiles otherwise, and a mesh that is not in the table is not looked at.
    if kept["jax"] != jax.__version__ or mesh not in kept["programs"]:
        return True
    before = kept["programs"][mesh]
    changed = [name for name in sorted(before.keys() | table.keys()) if before.get(name, 0) != table.get(name, 0)]
    for name in changed:
        print(f"  {mesh}: {name}: {before.get(name, 0):,} -> {table.get(name, 0):,}")
    return not changed
