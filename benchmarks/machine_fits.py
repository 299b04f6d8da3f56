"""What a step of each model needs on each machine that the recipe has sizes for: preflight, cell by cell.

    pip install -e '.[preflight]'
    python benchmarks/machine_fits.py --out benchmarks/machine_fits.jsonl              # what the file lacks, hours
    python benchmarks/machine_fits.py --out benchmarks/machine_fits.jsonl --table      # the file as Markdown
    python benchmarks/machine_fits.py --out benchmarks/machine_fits.jsonl --hours      # of every stage, predicted

A cell is one `baichuan-omni preflight` in a process of its own; its line is appended when it is done, so that the same
command goes on where it was stopped. Hours are the stage's model FLOPs over what the chips could do in bfloat16, at a
stated share of it: a prediction, nothing was timed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx

from baichuan_omni_jax.config import AUDIO_RUNS, STAGES, RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.config import MACHINES as MACHINE_CHIPS
from baichuan_omni_jax.config.machines import SIZED_MODELS, fit_of
from baichuan_omni_jax.config.stages import BY_DOCUMENTS
from baichuan_omni_jax.flops.terms import GPUS, TPUS, flops_by_branch, omni_terms
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.groups import assign_groups
from baichuan_omni_jax.train.preflight import Packing

MACHINES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:1")
# What of the language model trains, where not all of it, and the stages that train it.
GIVEN = {"attention": "attention alone", "layers": "text tables frozen"}
TRAIN_LANGUAGE = ("image_text_2", "image_audio_text_2", "omni_64k", "sft")
LONGEST = 65536  # tokens of a row of the recipe's last two stages
GIB = 2**30
# bfloat16 FLOP/s of a chip, by its name in a topology.
PEAKS = {chip.name.lower(): chip.flops for chip in (*TPUS.values(), *GPUS.values())}
KEPT = ("args_bytes", "temp_bytes", "peak_bytes", "hbm_bytes", "fits", "mesh", "model_flops", "suggestions", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one a cell")
    parser.add_argument("--stages", default="sft", metavar="A,B", help="of the recipe, or the audio runs")
    parser.add_argument("--machines", default=",".join(MACHINES), metavar="A,B")
    parser.add_argument("--models", default=",".join(SIZED_MODELS), metavar="A,B")
    parser.add_argument("--table", action="store_true", help="print what the file holds; compile nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every cell, kept with it")
    parser.add_argument(
        "--hours", action="store_true", help="print the predicted hours of every stage; compile nothing"
    )
    # A step of 14 B parameters compiles in some minutes of a machine of its own; four times that is a hang.
    parser.add_argument("--limit", type=int, default=2400, metavar="S", help="seconds of a cell (default 2400)")
    parser.add_argument("--utilization", type=float, default=0.4, metavar="X", help="of the chips' peak (default 0.4)")
    options = parser.parse_args()
    if options.hours:
        print("\n".join(hours_table(options.utilization)))
        return
    if options.table:
        print("\n".join(table(read(options.out))))
        return
    done = {key(cell) for cell in read(options.out)}
    for stage, machine, model in itertools.product(
        options.stages.split(","), options.machines.split(","), options.models.split(",")
    ):
        cell = {"stage": stage, "machine": machine, "model": model, "set": options.set}
        if key(cell) in done:
            continue
        cell |= settings_of(cell) | compiled(cell, options.limit)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(stage, machine, model, said(cell), flush=True)


def key(cell: dict) -> tuple:
    return (cell["stage"], cell["machine"], cell["model"], *cell["set"])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def overrides(cell: dict) -> list[str]:
    return [f"model={cell['model']}", f"machine={cell['machine']}", *cell["set"]]


def settings_of(cell: dict) -> dict:
    """What the recipe takes of the model on that machine."""
    run = load_run_config(cell["stage"], overrides(cell))
    return {
        "tokens": run.data.budgets.tokens,
        "rows": run.data.rows,
        "accumulate": run.train.accumulate,
        "moments": run.optimizer.moments_dtype,
        # The audio runs freeze it or have none.
        "language": fit_of(cell["model"], cell["machine"]).language if cell["stage"] in STAGES else "frozen",
    }


def compiled(cell: dict, limit: int) -> dict:
    """The report's numbers, or why there is none after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "baichuan_omni_jax", "preflight", "--config", cell["stage"]]
        command += [part for change in overrides(cell) for part in ("--set", change)]
        try:
            done = subprocess.run(
                [*command, "--json", str(report)], capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result in {limit} s"}
        if not report.exists():
            return {"error": done.stderr.strip()[-2000:]}
        found = json.loads(report.read_text(encoding="utf-8"))
    return {name: found[name] for name in KEPT}


def said(cell: dict) -> str:
    """One cell in words: what it needs of what there is, and what had to give."""
    if "error" in cell:
        return f"not compiled: {cell['error'][-120:]}"
    needed, room = cell["peak_bytes"] / GIB, cell["hbm_bytes"] / GIB
    fewer_rows = cell["stage"] in AUDIO_RUNS and cell["rows"] < load_run_config(cell["stage"]).data.rows
    gives = [
        f"rows of {cell['tokens']}" * (cell["stage"] in BY_DOCUMENTS and cell["tokens"] < LONGEST),
        f"{cell['rows']} rows a step" * fewer_rows,
        "bf16 moments" * (cell["moments"] == "bfloat16"),
        GIVEN.get(cell["language"], "") * (cell["stage"] in TRAIN_LANGUAGE),
    ]
    verdict = f"{needed:.1f} of {room:.1f} GiB" if cell["fits"] else f"**{needed - room:.1f} GiB too much**"
    return "; ".join(filter(None, (verdict, *gives)))


def table(cells: list[dict]) -> Iterator[str]:
    """Yields the Markdown rows of a table a stage: machines across, models down; what was not compiled is empty."""
    for stage in dict.fromkeys(cell["stage"] for cell in cells):
        found = {(cell["machine"], cell["model"]): cell for cell in cells if cell["stage"] == stage and not cell["set"]}
        machines = [name for name in MACHINES if any(machine == name for machine, _ in found)]
        yield f"| `{stage}` | " + " | ".join(f"`{machine}`" for machine in machines) + " |"
        yield "|---" * (len(machines) + 1) + "|"
        for model in SIZED_MODELS:
            shown = [found.get((machine, model)) for machine in machines]
            yield f"| `{model}` | " + " | ".join(said(cell) if cell else "" for cell in shown) + " |"
        yield ""


def parameters_of(run: RunConfig) -> dict[str, nnx.Variable]:
    """The run's model, as shapes by name."""
    omni = resolve_model(run.model)
    model = jax.eval_shape(lambda: OmniModel(jax.random.key(0), omni, ComputePolicy(), run.branches))
    return named_variables(model)


def hours_table(utilization: float) -> Iterator[str]:
    """Yields the Markdown rows of hours: stages across, machines and models down, all of the recipe's steps."""
    yield "| machine | model | " + " | ".join(f"`{stage}`" for stage in STAGES) + " | all |"
    yield "|---" * (len(STAGES) + 3) + "|"
    for machine, model in itertools.product(MACHINES, SIZED_MODELS):
        peak = MACHINE_CHIPS[machine] * PEAKS[machine.partition(":")[0]]
        runs = [load_run_config(stage, [f"model={model}", f"machine={machine}"]) for stage in STAGES]
        hours = [step_flops(run) * run.train.steps / (peak * utilization) / 3600 for run in runs]
        cells = " | ".join(f"{found:,.0f}" for found in (*hours, sum(hours)))
        yield f"| `{machine}` | `{model}` | {cells} |"


def step_flops(run: RunConfig) -> float:
    """Model FLOPs of one step, for rows filled as preflight assumes."""
    omni = resolve_model(run.model)
    trainable = assign_groups(parameters_of(run), run.optimizer.groups).trainable
    return sum(flops_by_branch(omni_terms(omni), Packing().counts(run, omni), trainable).values())


if __name__ == "__main__":
    main()
