"""What one training step costs a chip, read off the program that libtpu compiles for a slice that is not there.

    pip install -e '.[preflight]'
    python benchmarks/step_aot.py --out benchmarks/step_aot.jsonl --label before [--config configs/omni_64k.py] \\
        [--topologies v5p:4x4x4,v6e:16x16] [--set compute.remat=full]
    python benchmarks/step_aot.py --out benchmarks/step_aot.jsonl --table

One JSON object a configuration and topology. Nothing is timed. FLOPs: the model's by the formulas of the training
metrics, the hardware's those of the program's matrix products and of attention's kernels (`preflight/step_time.py`).
Bytes over the chip's links: of an array of n bytes that k chips gather or scatter n (k - 1) / k, twice that where they
all sum it; `hidden` is what goes on while the chip computes. Documents are preflight's.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Compiling is a matter for the CPU, and others may use libtpu at the same time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

from baichuan_omni_jax.config import RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.flops.terms import flops_by_branch, flops_by_term
from baichuan_omni_jax.sharding import axis_product
from baichuan_omni_jax.train.preflight import Packing, devices_of
from baichuan_omni_jax.train.preflight.compile import CompiledProgram, abstract_step, compile_for_devices
from baichuan_omni_jax.train.preflight.hlo import Collective, collectives_of
from baichuan_omni_jax.train.preflight.hlo_work import copied_bytes, products_of
from baichuan_omni_jax.train.preflight.step_time import program_work
from baichuan_omni_jax.train.state import StepSpec

GIB, TERA = 2**30, 1e12
# Larger sums over chips are of weights or of their gradients, but for what these scopes say.
LARGE = 2**22
ACTIVATIONS = re.compile(r"gather_kv|merge_media|pick_slots")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one a program")
    parser.add_argument("--label", default="", help="kept with the lines: which version of the code this is")
    parser.add_argument("--config", default="configs/omni_64k.py", metavar="FILE")
    parser.add_argument("--topologies", default="v5p:4x4x4,v6e:16x16", metavar="A,B")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="also write each program's HLO here")
    parser.add_argument("--table", action="store_true", help="print what the file holds as Markdown; compile nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))
        return 0
    for topology in options.topologies.split(","):
        # A configuration that is sized by its machine is laid out for this one.
        run = load_run_config(options.config, [f"machine={topology}", *options.set])
        line = {"label": options.label, "config": run.name, "topology": topology} | measure(run, topology, options.keep)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return 0


def measure(run: RunConfig, topology: str, keep: Path | None) -> dict[str, Any]:
    """Compiles the step and counts."""
    spec, state, batch = abstract_step(run, resolve_model(run.model), devices_of(topology, run.mesh.slices))
    built = compile_for_devices(spec, state, batch)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{run.name}_{topology.replace(':', '_')}.txt").write_text(built.hlo)
    return count(run, spec, built)


def count(run: RunConfig, spec: StepSpec, built: CompiledProgram) -> dict[str, Any]:
    """Counts one chip's work in a compiled step."""
    mesh, memory = dict(spec.mesh.shape), built.memory
    collectives = collectives_of(built.hlo, mesh)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for one in collectives:
        for place, value in enumerate((one.times, one.times * one.bytes / GIB, one.times * one.hidden)):
            kinds[one.kind][place] += value
    sums = [
        one
        for one in collectives
        if one.kind == "all-reduce" and one.bytes >= LARGE and not ACTIVATIONS.search(one.scope)
    ]
    links = {True: 0.0, False: 0.0}
    for one in collectives:
        links[one.hidden] += one.times * link_bytes(one, axis_product(spec.mesh, one.axes))
    flops = count_flops(run, spec, built.hlo)
    return {
        "mesh": mesh,
        "remat": run.compute.remat,
        **flops,
        "collectives": {
            kind: dict(zip(("count", "GiB", "hidden"), v, strict=True)) for kind, v in sorted(kinds.items())
        },
        "weight_all_reduces": sum(one.times for one in sums),
        "weight_all_reduce_gib": sum(one.times * one.bytes for one in sums) / GIB,
        "ici_gib": sum(links.values()) / GIB,
        "ici_hidden_gib": links[True] / GIB,
        "copies_gib": copied_bytes(built.hlo) / GIB,
        "temp_gib": memory.temp / GIB,
        "args_gib": memory.args / GIB,
        "peak_gib": memory.peak / GIB,
        "seconds": round(built.seconds),
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
    }


def link_bytes(one: Collective, chips: int) -> float:
    """Bytes that a chip sends for a collective among `chips`."""
    return one.bytes * (chips - 1) / chips * (2 if one.kind == "all-reduce" else 1)


def count_flops(run: RunConfig, spec: StepSpec, hlo: str) -> dict[str, float]:
    """Counts a chip's TFLOP: of the model, of the hardware, and of the text logits needed and computed."""
    packing, chips, terms = Packing(), spec.mesh.devices.size, spec.task.flop_terms()
    counts = packing.counts(run, spec.task.omni)
    model = sum(flops_by_branch(terms, counts, spec.groups.trainable).values()) / chips
    needed = flops_by_term(terms, counts, spec.groups.trainable)["llm logits"] / chips
    work = program_work(hlo, spec, spec.task.omni, counts, packing.visited_pairs(run), 0)
    hardware = work.product_flops + work.forward_flops + work.backward_flops
    logits = sum(one.flops * one.times for one in products_of(hlo) if "text_loss" in one.scope)
    return {
        "model_tflop": model / TERA,
        "hardware_tflop": hardware / TERA,
        "hardware_over_model": hardware / model,
        "logits_over_needed": logits / needed,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Writes one column a line, as Markdown."""
    shown = {
        "hardware / model FLOPs": lambda one: (
            f"{one['hardware_tflop']:.0f} / {one['model_tflop']:.0f} TFLOP = {one['hardware_over_model']:.2f}"
        ),
        "text logits, of the needed": lambda one: f"{one['logits_over_needed']:.2f}",
        "sums of weights or gradients over all chips": lambda one: (
            f"{one['weight_all_reduces']}, {one['weight_all_reduce_gib']:.1f} GiB"
        ),
        "over the links of a chip": lambda one: (
            f"{one['ici_gib']:.1f} GiB, {one['ici_hidden_gib']:.1f} beside products"
        ),
        "copies": lambda one: f"{one['copies_gib']:.1f} GiB",
        "temporaries + arguments": lambda one: f"{one['temp_gib']:.1f} + {one['args_gib']:.1f} GiB",
    }
    head = ["", *(f"{one['config']} {one['topology']} {one['label']}" for one in lines)]
    rows = [head, ["---"] * len(head), *([name, *map(write, lines)] for name, write in shown.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
