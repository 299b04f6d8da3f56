"""What do other optimizers learn, and keep, on a stage of the small recipe beside AdamW? Held-out scores, on a CPU.

    python benchmarks/optimizers.py --workdir DIR [--kinds adamw muon] [--json]

The first stage of seeing, from random weights, on handwritten digits: 120 steps of the same rows for each, at the rates
that the stage has. A digit that nobody looks at is named right one time in ten.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rows import emit, row

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "small" / "image_text_1_digits.py"
# Name -> settings. AdamW as the stage has it comes first: the others are held against it.
KINDS = {
    "adamw": [],
    "adamw_bfloat16_moments": ["optimizer.moments_dtype=bfloat16"],
    "adafactor": ["optimizer.optimizer=adafactor"],
    "muon": ["optimizer.optimizer=muon"],
    # AdamW, with int8 products in the language model's layers.
    "int8": ["compute.quantize=int8"],
}
CURVE = (20, 40, 80, 120)


def train(kind: str, data: Path, workdir: Path) -> dict:
    """Trains the stage, unless it is there, and returns what it reached."""
    sets = [
        f"data.root={data}",
        f"data.tokenizer={data / 'tokenizer.json'}",
        "checkpoint.init_from=llm=random,vision=random",
        *KINDS[kind],
    ]
    command = [sys.executable, "-m", "baichuan_omni_jax", "train", "--config", str(CONFIG), "--workdir", str(workdir)]
    subprocess.run([*command, *(f"--set={item}" for item in sets)], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    state = sum(path.stat().st_size for path in (last / "opt_state").rglob("*") if path.is_file())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {
        "accuracy": [line["ability/digit/accuracy"] for line in lines if "ability/digit/accuracy" in line][-1],
        "state": state,
        "curve": {step: round(losses[step], 3) for step in CURVE if step in losses},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="data and runs lie here; what is there is kept")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which of them (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    # The data of the recipe's own test: all handwritten digits, and next to nothing else.
    from data_pipelines.small.__main__ import build_small
    from data_pipelines.small.documents import Counts
    from data_pipelines.small.spoken import SpokenCounts

    data, rows, base = options.workdir / "data", [], None
    spoken = SpokenCounts(words=4, numbers=4, sentences=4, speech=6, questions=6, dialogue=4, held_out=4)
    counts = Counts(digits=3, pictures=60, charts=40, motion=12, text=60, spoken=spoken, held_out=100)
    if not (data / "tokenizer.json").exists():
        build_small(data, counts=counts, progress=False)
    for kind in options.kinds:
        found = train(kind, data, options.workdir / kind)
        base = base or found
        ratio = found["state"] / base["state"]
        note = f"chance 10; state {ratio:.2f} of the first; loss {found['curve']}"
        rows.append(row(f"optimizers: {kind}", 100 * found["accuracy"], "% of held-out digits", note=note))
    return emit(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
