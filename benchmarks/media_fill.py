"""What does it cost to keep pictures whole in the parts of a row?

    python benchmarks/media_fill.py [--json] [--tokens 65536] [--patches 131072] [--documents 6000] [--seed 0]

Synthetic documents in equal shares: text, a still, one to six stills between text, a video of 4 to 32 frames. They are
packed by the row plan of training with `data.media_shards` of 1 (the peer: any place will do), 8, 16 and 32. Reports
how full the patch arrays are, how many documents no row can hold, and the plan's time. Pure arithmetic.
"""

import argparse
import sys
import time

import grain
import numpy as np
from rows import emit, row

from data_pipelines.media_layout import PatchLayout
from data_pipelines.row_plan import RowPlan

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
    """Mean fill of the patch array of all but the last rows, documents skipped, and ms a row."""
    layout = PatchLayout(budgets[1], parts)
    kept = [document for document in given if layout.fits(document[1])]
    needs = np.array([(tokens, sum(sizes)) for tokens, sizes in kept])
    stream = grain.MapDataset.range(len(kept)).map(lambda number: (0, number))
    plan = RowPlan(stream, lambda _, i: needs[i], lambda _, i: kept[i][1], budgets, layout, OPEN_BINS)
    start = time.perf_counter()
    fills = [sum(needs[i][1] for _, i in line) / budgets[1] for line in plan]
    cost = 1e3 * (time.perf_counter() - start) / len(fills)
    return float(np.mean(fills[:-OPEN_BINS])), len(given) - len(kept), cost


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
