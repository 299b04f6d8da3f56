"""How well do the TPU attention kernels fill the matrix units? Read off libtpu's own schedule, without a TPU.

    python benchmarks/kernel_schedule.py [--chips v5p v6e] [--widths 64 80 128] [--block 512 512] [--json]

Each kernel is compiled ahead of time by a process of its own, with libtpu's flags for writing the final bundles (the
instructions that are issued together). Of each path through a pair of blocks (without a mask, with one) a row tells
which share of the matrix units' issue slots it fills: products x cycles each occupies one / (bundles x units). Static:
waits are not in it, so that more than 100 % means units that are never idle and bundles that wait for them. `products`
counts the issues themselves, `spills` the vectors that do not fit registers.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rows import emit, row

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Query and key heads of one grid step's group, by the width of a head: the language model, the vision tower, Whisper.
HEADS = {128: (28, 4, True), 80: (16, 16, False), 64: (20, 20, False)}
KERNELS = ("forward", "dq", "dkv")
GOALS = {("v5p", 128, "forward"): 85.0, ("v5p", 128, "dq"): 90.0, ("v5p", 128, "dkv"): 90.0}
LENGTH = 4096  # what a path does is the same for any
# Cycles that a unit is busy with one product, 16 rows of bf16: peak FLOP/s = units x side^2 x 2 x rows a cycle x clock.
CYCLES = {"v5p": 16, "v6e": 8}
_LEAST = 64  # products from which a stretch of bundles is a path
# "0x7a5 PF: > { ... }": an address, a mark where control arrives, the bundle.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s+(\w*)\s*:[\s>]*\{")
_COUNTS = re.compile(r"\d+(?: \d+)+\s*")


class Stretch(NamedTuple):
    """One stretch of bundles without a branch: its length, products, spilled and reloaded vectors."""

    bundles: int
    products: int
    spills: int
    fills: int
    units: int
    cycles: int

    @property
    def share(self) -> float:
        """Percent of the units' slots that products take."""
        return 100 * self.products * self.cycles / (self.units * self.bundles)


def read_paths(folder: Path, kernel: str, cycles: int) -> list[Stretch]:
    """Reads the paths of a kernel, the one with the fewest bundles first.

    Args:
        folder: what libtpu wrote.
        kernel: a name of `KERNELS`.
        cycles: of the chip's `CYCLES`.

    Returns:
        Paths with products; none where the kernel is not there.
    """
    written = sorted(folder.glob(f"*-{kernel}_kernel*-final_bundles.txt"))
    bundles = [file for file in written if "schedule-analysis" not in file.name]
    used = sorted(folder.glob(f"*-{kernel}_kernel*-final_hlo-static-per-bundle-utilization.txt"))
    if not bundles or not used:
        return []
    # The second file has a line of counts a bundle, and before them what each column counts and how many there can be.
    lines = used[-1].read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    units = int(lines[2].split()[names.index("MXU")])
    counts = [list(map(int, line.split())) for line in lines[3:] if _COUNTS.fullmatch(line)]
    stretches: list[list[tuple[int, list[int]]]] = [[]]
    with bundles[-1].open() as file:
        issued = ((match, line) for line in file if (match := _BUNDLE.match(line)))
        for (match, line), count in zip(issued, counts, strict=True):
            if match[1]:  # control arrives here
                stretches.append([])
            stretches[-1].append((line.count("vmatmul."), count))
            if "sbr.rel" in line:
                stretches.append([])
    spill, fill = names.index("VSTORE:SPILL"), names.index("VLOAD:FILL")
    found = [
        Stretch(
            len(stretch),
            sum(products for products, _ in stretch),
            sum(count[spill] for _, count in stretch),
            sum(count[fill] for _, count in stretch),
            units,
            cycles,
        )
        for stretch in stretches
    ]
    return sorted(path for path in found if path.products >= _LEAST)


def compile_kernels(chip: str, width: int, block_q: int, block_kv: int) -> None:
    """Compiles forward and backward in this process, whose libtpu writes its schedules as the environment says."""
    from attention_aot import compile_attention
    from jax.sharding import PartitionSpec as P

    from baichuan_omni_jax.kernels.flash_attention.cases import Heads

    heads = Heads(*HEADS[width][:2], width, causal=HEADS[width][2])
    compile_attention(TOPOLOGIES[chip], heads, LENGTH, block_q, block_kv=block_kv, spec=P("chips"))


def measure(chip: str, width: int, block_q: int, block_kv: int) -> list[dict]:
    """Compiles in a process of its own; returns a row for each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--compile", chip, str(width), str(block_q), str(block_kv)]
        done = subprocess.run(command, env=os.environ | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{chip}, heads of {width}: {done.stderr.strip().splitlines()[-1]}")
        rows = []
        for kernel in KERNELS:
            paths = read_paths(Path(folder), kernel, CYCLES[chip])
            if not paths:
                sys.exit(f"{chip}, heads of {width}: libtpu wrote no schedule of {kernel}")
            goal = GOALS.get((chip, width, kernel))
            told = "; ".join(
                f"{kind}: {path.share:.1f} %, {path.bundles} bundles, {path.products} products, {path.spills} spills, "
                f"{path.fills} fills"
                for kind, path in zip(("unmasked", "masked"), paths, strict=False)
            )
            rows.append(
                row(
                    f"schedule_{chip}_{width}_{kernel}",
                    paths[0].share,
                    "% of MXU slots",
                    goal=None if goal is None else f">= {goal:g}",
                    ok=None if goal is None else paths[0].share >= goal,
                    note=f"blocks of {block_q} x {block_kv}, {paths[0].units} units; {told}",
                )
            )
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--widths", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--block", nargs=2, type=int, metavar=("Q", "KV"), default=(512, 512))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--compile", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_kernels(args.compile[0], *map(int, args.compile[1:]))
        return 0
    rows = [one for chip in args.chips for width in args.widths for one in measure(chip, width, *args.block)]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
