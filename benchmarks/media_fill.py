"""What does it cost to keep pictures whole in the parts of a row?

    python benchmarks/media_fill.py [--json] [--tokens 65536] [--patches 131072] [--documents 6000] [--seed 0]

Synthetic documents in equal shares: text, a still, one to six stills between text, a video of 4 to 32 frames. They are
packed by the row plan of training with `data.media_shards` of 1 (the peer: any place will do), 8, 16 and 32. Reports
how full the patch arrays are, how many documents no row can hold, and the plan's time. Pure arithmetic.
"""

import argparse
import sys
import time

import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import DataConfig
from data_pipelines.packing.packer import Packer
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout

PARTS = (1, 8, 16, 32)
OPEN_BINS = 8
LARGEST = 16384
"""Patches of the largest picture."""


def pictures(rng: np.random.Generator, kind: int) -> list[int]:
    """Patches of a document's pictures, multiples of 4: of no picture, a still, some stills, a video's frames."""
    if kind == 3:
        return [int(rng.choice([256, 400, 576, 768, 1024]))] * int(rng.integers(4, 33))
    count = (0, 1, int(rng.integers(1, 7)))[kind]
    sizes = np.clip(rng.lognormal(np.log(2000), 0.8, count), 16, LARGEST)
    return (sizes // 4 * 4).astype(int).tolist()


def documents(count: int, length: int, seed: int) -> list[tuple[int, list[int]]]:
    """(tokens, patches of each picture)."""
    rng = np.random.default_rng(seed)
    found = []
    for kind in rng.integers(4, size=count):
        sizes = pictures(rng, kind)
        words = rng.lognormal(np.log(200 if sizes else 1500), 0.8)
        found.append((min(length, sum(sizes) // 4 + int(words) + 1), sizes))
    return found


def pack(given: list[tuple[int, list[int]]], budgets: list[int], parts: int) -> tuple[float, int, float]:
    """Mean fill of the patch arrays (but of rows that the end of the documents closed), documents skipped, ms a row."""
    layout = PatchLayout(budgets[1], parts)
    kept = [document for document in given if layout.fits(document[1])]
    needs = [(tokens, sum(sizes)) for tokens, sizes in kept]
    items = [DocumentLengths(i, need, sizes) for i, (need, (_, sizes)) in enumerate(zip(needs, kept, strict=True))]
    packer = Packer(budgets, layout, OPEN_BINS, DataConfig().look_ahead)
    start = time.perf_counter()
    rows = [line for item in items if (line := packer.add(item))]
    while line := packer.finish():
        rows.append(line)
    fills = [sum(item.lengths[1] for item in line) / budgets[1] for line in rows]
    cost = 1e3 * (time.perf_counter() - start) / len(fills)
    return float(np.mean(fills[: -2 * OPEN_BINS])), len(given) - len(kept), cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a row")
    parser.add_argument("--patches", type=int, default=131072, help="patches of a row, divisible by 128")
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.patches % (4 * max(PARTS)):
        parser.error("--patches must be divisible by 128")
    given = documents(options.documents, options.tokens, options.seed)
    measured = {parts: pack(given, [options.tokens, options.patches], parts) for parts in PARTS}
    whole, lines = measured[1][0], []
    for parts, (fill, skipped, cost) in measured.items():
        note = f"parts of {options.patches // parts} patches; {skipped} of {len(given)} documents skipped; "
        peer = {"peer": "1 part", "peer_value": whole, "ratio": fill / whole} if parts > 1 else {}
        lines.append(row(f"patch_fill_{parts}_parts", fill, "of the row", **peer, note=note + f"{cost:.1f} ms/row"))
    return emit(lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
