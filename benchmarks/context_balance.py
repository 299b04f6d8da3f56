"""How evenly is a packed row's attention work shared among context shards?

    python benchmarks/context_balance.py [--json] [--shards 8] [--length 65536] [--block 512] [--rows 500] [--seed 0]

Rows are packed from documents of log-normal length by the row plan of training. Work is what a shard's queries visit:
pairs of blocks in the attention kernel's causal plan. Each row's most loaded shard is compared with the mean, dealt as
in training, contiguously, and as two mirrored chunks a shard (shard i of n has chunks i and 2n-1-i of 2n). The goal is
on the worst row. Pure arithmetic: no accelerator, no data.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import DataConfig
from data_pipelines.packing.batch import block_work, deal_blocks, lay_documents
from data_pipelines.packing.packer import Packer
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout

MEANS = (3000, 16000)
SIGMA = 1.2
OPEN_BINS = 8
GOAL = 1.02


def packed_rows(mean: float, length: int, rows: int, seed: int) -> Iterator[list[int]]:
    """Lengths of the documents of each row: log-normal with this mean, cut at the row's length."""
    rng = np.random.default_rng(seed)
    enough = 2 * rows * max(1, round(length / mean)) + 100 * OPEN_BINS
    sizes = np.clip(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, enough).round(), 1, length).astype(np.int64)
    packer = Packer([length], PatchLayout(0), OPEN_BINS, DataConfig().look_ahead)
    packed = (packer.add(DocumentLengths(number, (size,), [])) for number, size in enumerate(sizes.tolist()))
    for line in islice((line for line in packed if line), rows):
        yield [item.lengths[0] for item in line]


def contiguous(blocks: int, shards: int) -> np.ndarray:
    return np.arange(blocks).reshape(shards, -1)


def dual_chunk(blocks: int, shards: int) -> np.ndarray:
    chunks = np.arange(blocks).reshape(2 * shards, -1)
    return np.concatenate([chunks[:shards], chunks[::-1][:shards]], axis=1)


def imbalance(work: np.ndarray, dealt: np.ndarray) -> float:
    """The most loaded shard's work over the mean."""
    load = work[dealt].sum(1)
    return float(load.max() / load.mean())


def measure(mean: int, options: argparse.Namespace) -> list[dict]:
    blocks, shards = options.length // options.block, options.shards
    found, seconds = [], []
    for lengths in packed_rows(mean, options.length, options.rows, options.seed):
        start = time.process_time()
        work = block_work(*lay_documents(lengths, options.length), options.block)
        dealt = deal_blocks(work, shards)
        seconds.append(time.process_time() - start)
        peers = (contiguous(blocks, shards), dual_chunk(blocks, shards))
        lower_bound = np.ceil(work.sum() / shards) / (work.sum() / shards)
        found.append([*(imbalance(work, each) for each in (dealt, *peers)), lower_bound])
    worst, median = np.max(found, axis=0), np.median(found, axis=0)
    note = f"{options.rows} rows of {options.length}, {shards} shards, block {options.block}; max/mean of visited pairs"
    bound = f"whole pairs allow no less than {worst[3]:.4f}"
    lines = []
    for which, value in (("worst", worst), ("median", median)):
        goal = {"goal": f"<= {GOAL}", "ok": value[0] <= GOAL} if which == "worst" else {}
        for peer, theirs in (("contiguous", value[1]), ("dual chunk", value[2])):
            name = f"imbalance_mean{mean}_{which}"
            ratio = theirs / value[0]
            own = f"{note}; {bound}" if which == "worst" else note
            lines.append(row(name, value[0], "x", peer=peer, peer_value=theirs, ratio=ratio, **goal, note=own))
    cost = 1e3 * float(np.median(seconds))
    return [*lines, row(f"plan_time_mean{mean}", cost, "CPU ms/row", note="work and dealing of one row on the host")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--length", type=int, default=65536, help="tokens of a row")
    parser.add_argument("--block", type=int, default=512, help="tokens of a block")
    parser.add_argument("--rows", type=int, default=500, help="rows of each mean length")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.length % (2 * options.shards * options.block):
        parser.error("--length must be divisible by 2 x --shards x --block")
    return emit([line for mean in MEANS for line in measure(mean, options)], options.json)


if __name__ == "__main__":
    sys.exit(main())
