"""How much memory does converting a checkpoint take, and how fast is it?

    python benchmarks/convert_memory.py [--json] [--layers 28] [--directory DIR]

Builds a random four-shard Hugging Face checkpoint (3.2 GB with 28 layers of a 1.5 B language model's sizes, the other
branches tiny) in a temporary folder, runs `launch/convert_weights.py` each way as a process of its own, and reports its
peak resident memory and bytes a second. Needs three times the checkpoint's room on disk for a while.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rows import emit, row

from baichuan_omni_jax.config import OmniConfig, tiny
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GOAL_GB = 1.5
SHARDS = 4


def config(layers: int) -> OmniConfig:
    """The language model of Qwen2.5-1.5B with a smaller vocabulary; every other branch as small as `tiny`."""
    small = tiny()
    llm = replace(
        small.llm,
        vocab_size=32768,
        hidden_size=1536,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=8960,
    )
    return replace(
        small, llm=llm, vision=replace(small.vision, out_dim=1536), audio_head=replace(small.audio_head, head_dim=128)
    )


def run(arguments: list[str]) -> tuple[float, float]:
    """(peak resident GB, seconds) of a conversion. Exits when it fails."""
    command = [sys.executable, "launch/convert_weights.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: {errors}")
    return usage.ru_maxrss * 1024 / 1e9, time.perf_counter() - start


def measure(folder: Path, layers: int) -> list[dict]:
    source, middle, back = folder / "hf", folder / "ours", folder / "back"
    nbytes = write_random_checkpoint(source, config(layers), shards=SHARDS)
    shards = len(list(source.glob("model-*.safetensors")))
    what = f"{nbytes / 1e9:.2f} GB in {shards} shards, {layers} stacked layers"
    rows = []
    for name, arguments in (
        ("to-jax", ["to-jax", "--from", str(source), "--to", str(middle)]),
        ("to-torch", ["to-torch", "--from", str(middle), "--to", str(back), "--shard-mb", "800"]),
    ):
        peak, seconds = run(arguments)
        note = f"{what}; {seconds:.1f} s"
        goal = {"goal": f"<= {GOAL_GB}", "ok": peak <= GOAL_GB}
        rows.append(row(name, peak, "GB", **goal, note=f"peak resident memory; {note}"))
        rows.append(row(f"{name} speed", nbytes / seconds, "bytes/s", note=note))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--directory", help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        rows = measure(Path(folder), options.layers)
    return emit(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
