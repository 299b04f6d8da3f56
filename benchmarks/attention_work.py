"""How many pairs of blocks does attention visit, and how much is that against a kernel that only masks?

    python benchmarks/attention_work.py [--length 65536] [--block 512] [--seed 0] [--json]

The plan is compared with an oracle that knows nothing of it: at a small size every pair of tokens, at the full size the
segments and the earliest and latest position of each within a block. A mask-only kernel visits the whole causal
triangle (every square, if bidirectional); the saving is its pairs of blocks over ours. Nothing is timed.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from rows import emit, row

from baichuan_omni_jax.kernels.flash_attention import plan_blocks
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, VIT, Case, frames, log_normal, permute_blocks
from baichuan_omni_jax.kernels.flash_attention.plan import Segments, unpack

SMALL_LENGTH, SMALL_BLOCK, LAYOUTS = 192, 16, 200


def planned(ids: np.ndarray, positions: np.ndarray, causal: bool, block: int) -> np.ndarray:
    """(rows, query blocks, key blocks) bool: the pairs that the plan lists."""

    @jax.jit
    def build(ids, positions):
        plan = plan_blocks(Segments.from_row(ids, positions), causal, block, block)
        return plan.by_query[:, 0], plan.count[:, 0]

    blocks = ids.shape[1] // block
    visited = np.zeros((len(ids), blocks, blocks), bool)
    for table, pairs, count in zip(visited, *(np.asarray(x) for x in build(ids, positions)), strict=True):
        query, key, _ = unpack(pairs[:count])
        table[query, key] = True
    return visited


def by_tokens(ids: np.ndarray, positions: np.ndarray, causal: bool, block: int) -> np.ndarray:
    """The same table from every pair of tokens."""
    mask = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
    if causal:
        mask &= positions[:, None] <= positions[:, :, None]
    blocks = ids.shape[1] // block
    return mask.reshape(len(ids), blocks, block, blocks, block).any((2, 4))


def by_segment(ids: np.ndarray, positions: np.ndarray, causal: bool, block: int) -> np.ndarray:
    """The same table for one long row: a document's latest token of each block sees its earliest of another."""
    blocks = ids.shape[1] // block
    tables = np.zeros((len(ids), blocks, blocks), bool)
    for table, row_ids, row_positions in zip(tables, ids, positions, strict=True):
        of_block = np.arange(len(row_ids)) // block
        for document in np.unique(row_ids[row_ids > 0]):
            mine = row_ids == document
            inside, places = of_block[mine], row_positions[mine]
            earliest, latest = np.full(blocks, len(row_ids)), np.full(blocks, -1)
            np.minimum.at(earliest, inside, places)
            np.maximum.at(latest, inside, places)
            present = latest >= 0
            seen = present[:, None] & present[None, :]
            table |= seen & (earliest[None, :] <= latest[:, None]) if causal else seen
    return tables


def layouts(rng: np.random.Generator, *, ascending: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random short rows with padding and blocks permuted; `ascending` is false: documents' ids in a random order."""
    rows = []
    for _ in range(LAYOUTS):
        sizes = rng.integers(1, rng.choice([4, 20, 80]), rng.integers(0, 30))
        sizes = sizes[np.cumsum(sizes) <= SMALL_LENGTH]
        case = Case("", LLM, SMALL_LENGTH, SMALL_BLOCK, (tuple(map(int, sizes)),), permuted=True)
        ids, positions = case.ids_and_positions(int(rng.integers(1 << 30)))
        rows.append((ids if ascending else rename(ids, rng), positions))
    return tuple(np.concatenate(x) for x in zip(*rows, strict=True))


def rename(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other names for the segments, so that ids no longer ascend in a row; 0 stays padding."""
    names = np.concatenate([[0], 1 + rng.permutation(ids.max())])
    return names[ids].astype(np.int32)


def exactness(rng: np.random.Generator) -> list[dict]:
    """Short rows: pairs in which the plan and all pairs of tokens differ, or that it misses when ids do not ascend."""
    rows = []
    what = f"{LAYOUTS} random rows of {SMALL_LENGTH}, blocks of {SMALL_BLOCK} permuted, causal and not"
    for ascending in (True, False):
        ids, positions = layouts(rng, ascending=ascending)
        tables = [
            [find(ids, positions, causal, SMALL_BLOCK) for causal in (True, False)] for find in (planned, by_tokens)
        ]
        ours, oracle = (np.stack(x) for x in tables)
        missed, extra = int((oracle & ~ours).sum()), int((ours & ~oracle).sum())
        note = f"{what}, every pair of tokens: {missed} missed, {extra} of {int(ours.sum())} not needed"
        if ascending:
            rows.append(mismatches("visited, ids ascend", missed + extra, note))
        else:
            rows.append(mismatches("missed, ids in any order", missed, note))
    return rows


def exact_rows(case: Case, rng: np.random.Generator) -> dict:
    """Long rows, in order and with their blocks permuted: pairs in which the plan and the oracle differ."""
    ids, positions = (x[:8] for x in case.ids_and_positions())
    wrong = 0
    for order in (np.arange(case.length // case.block), rng.permutation(case.length // case.block)):
        arrays = [permute_blocks(x, order, case.block) for x in (ids, positions)]
        tables = [find(*arrays, case.heads.causal, case.block) for find in (planned, by_segment)]
        wrong += int((tables[0] != tables[1]).sum())
    note = f"{len(ids)} rows of {case.length}, block {case.block}, in order and with blocks permuted"
    return mismatches(f"visited, {case.name}", wrong, note)


def mismatches(name: str, count: int, note: str) -> dict:
    return row(name, count, "wrong block pairs", peer="oracle", goal="== 0", ok=count == 0, note=note)


def work(case: Case) -> tuple[int, int, str]:
    """Pairs of blocks that ours and a mask-only kernel visit in all rows of the case, and what was counted."""
    ids, positions = case.ids_and_positions()
    ours = int(planned(ids, positions, case.heads.causal, case.block).sum())
    blocks = case.length // case.block
    theirs = len(ids) * (blocks * (blocks + 1) // 2 if case.heads.causal else blocks**2)
    return ours, theirs, f"{len(ids)} rows of {case.length}, block {case.block}"


def saving(case: Case, goal: float) -> dict:
    """The mask-only kernel's pairs over ours."""
    ours, theirs, note = work(case)
    peer = {"peer": "mask-only kernel", "peer_value": theirs, "ratio": theirs / ours}
    return row(
        f"saved, {case.name}", ours, "block pairs", **peer, goal=f">= {goal}", ok=theirs / ours >= goal, note=note
    )


def overhead(case: Case) -> dict:
    """Pairs of ours over the causal triangle's, where nothing can be saved."""
    ours, theirs, note = work(case)
    peer = {"peer": "causal triangle", "peer_value": theirs, "ratio": ours / theirs}
    return row(f"extra, {case.name}", ours, "block pairs", **peer, goal="<= 1.01", ok=ours <= 1.01 * theirs, note=note)


def measure(length: int, block: int, rows: int, seed: int) -> list[dict]:
    seeds = range(seed * rows, (seed + 1) * rows)
    text = Case("log-normal (mean 3k)", LLM, length, block, tuple(log_normal(length, 3000, 1.0, s) for s in seeds))
    even = Case("16 documents", LLM, length, block, ((length // 16,) * 16,))
    images = Case("frames of ~1k patches", VIT, length, block, tuple(frames(length, 1024, s) for s in seeds))
    single = Case("1 document", LLM, length, block, ((length,),))
    rng = np.random.default_rng(seed)
    return [
        *exactness(rng),
        *(exact_rows(case, rng) for case in (text, even, images, single)),
        saving(text, 8),
        saving(even, 14),
        saving(images, 25),
        overhead(single),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128, help="of random lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return emit(measure(options.length, options.block, options.rows, options.seed), options.json)


if __name__ == "__main__":
    sys.exit(main())
