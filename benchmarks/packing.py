"""How full are packed rows, how fast are they planned, and how even is the work of data-parallel ranks?

    python benchmarks/packing.py [--json] [--documents 60000] [--planned 10000000] [--seed 0]

Log-normal documents (mean 3000 tokens, sigma 1.0, at most 64k) in rows of 65536 tokens with 8 open bins, packed by the
row plan of training. With three budgets the documents are text, pictures or sound in equal shares, and the patches and
code frames of a row are 1.25 times what its tokens bring on average. Peer: Grain's best-fit packer, as many bins, on
the same documents. Ranks: rows ordered in windows of 16 steps, one row a rank, FLOPs of the 7B model. Restoring: a plan
taken up after `--planned` documents, in the middle of a window. Pure arithmetic: nothing is decoded.
"""

import argparse
import json
import sys
import time
from collections import Counter
from itertools import islice

import grain
import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import DataConfig, baichuan_omni_7b
from baichuan_omni_jax.flops.terms import row_cost
from data_pipelines.packing.mixture import Mixture
from data_pipelines.packing.packer import Packer, RowPlan
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout
from data_pipelines.packing.step_plan import StepPlan

LENGTH, MEAN, SIGMA, LONGEST = 65536, 3000, 1.0, 65536
SLACK = 1.25
OPEN_BINS, LOOK_AHEAD = 8, DataConfig().look_ahead
RANKS, WINDOW = 32, 16


class Listed:
    """Documents of these lengths as a source of the mixture."""

    def __init__(self, lengths: np.ndarray):
        self.name, self.total, self.usable = "documents", len(lengths), len(lengths)
        self._lengths = lengths

    def expand(self, numbers: np.ndarray) -> list[list[DocumentLengths]]:
        needs = self._lengths[numbers].tolist()
        return [
            [DocumentLengths(number, tuple(need), [])] for number, need in zip(numbers.tolist(), needs, strict=True)
        ]

    def document_lengths(self, number: int) -> DocumentLengths:
        return DocumentLengths(number, tuple(self._lengths[number].tolist()), [])

    def why_unusable(self) -> str:
        return "there is none"


def documents(count: int, seed: int) -> np.ndarray:
    """(count, 1) tokens."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, (count, 1)).clip(1, LONGEST).astype(int)


def media_documents(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """(count, 3) tokens, patches (four a token) and code frames (one a token) of 30 to 90 % of a document's tokens,
    and the budgets.
    """
    tokens, rng = documents(count, seed), np.random.default_rng(seed + 1)
    kind, share = rng.integers(3, size=count), rng.uniform(0.3, 0.9, count)
    media = (tokens[:, 0] * share).astype(int)
    needs = np.concatenate([tokens, np.stack([4 * media * (kind == 1), media * (kind == 2)], 1)], 1)
    budgets = [LENGTH, *np.ceil(SLACK * LENGTH * needs[:, 1:].mean(0) / tokens.mean()).astype(int).tolist()]
    # What an empty row cannot hold is another question: such documents have as many media as one can.
    return np.minimum(needs, budgets), budgets


def plan_of(lengths: np.ndarray, budgets: list[int], seed: int, epochs: int | None = None) -> RowPlan:
    mixture = Mixture([Listed(lengths)], [1.0], seed, epochs=epochs)
    return RowPlan(mixture, Packer(budgets, PatchLayout(0), OPEN_BINS, LOOK_AHEAD))


def pack(lengths: np.ndarray, budgets: list[int], seed: int) -> tuple[list[list[DocumentLengths]], float]:
    """All rows of one epoch, and the seconds it took. Fails when a document is lost, doubled or cut."""
    start = time.perf_counter()
    rows = list(plan_of(lengths, budgets, seed, epochs=1))
    seconds = time.perf_counter() - start
    assert Counter(item.key[1] for line in rows for item in line) == Counter(range(len(lengths)))
    assert Counter(item.lengths for line in rows for item in line) == Counter(map(tuple, lengths.tolist()))
    return rows, seconds


def fill_of(rows: list[list[DocumentLengths]], budgets: list[int]) -> tuple[float, int]:
    """Mean fill of the binding budget (the fullest) over all rows but those that only the end of the documents closed,
    and the number of these.
    """
    last = OPEN_BINS + LOOK_AHEAD * MEAN // LENGTH + 1
    used = np.array([np.sum([item.lengths for item in line], 0) for line in rows[:-last]]) / budgets
    return float(used.mean(0).max()), last


def grain_fill(lengths: np.ndarray, budgets: list[int]) -> float:
    """The same of Grain's best-fit packer."""
    names = [f"budget{number}" for number in range(len(budgets))]
    elements = [{name: np.ones(size, np.int8) for name, size in zip(names, need, strict=True)} for need in lengths]
    rows = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source(elements).to_iter_dataset(),
        length_struct=dict(zip(names, budgets, strict=True)),
        num_packing_bins=OPEN_BINS,
    )
    filled = [[np.count_nonzero(line[f"{name}_segment_ids"]) for name in names] for line in rows]
    return float((np.array(filled[:-OPEN_BINS]) / budgets).mean(0).max())


def fill_row(name: str, goal: float, lengths: np.ndarray, budgets: list[int], seed: int, peers: int) -> dict:
    rows, _ = pack(lengths, budgets, seed)
    (fill, last), theirs = fill_of(rows, budgets), grain_fill(lengths[:peers], budgets)
    note = f"{len(rows)} rows of {len(lengths)} documents, the last {last} not counted; 0 documents cut or lost"
    peer = {"peer": "grain best fit", "peer_value": theirs, "ratio": fill / theirs}
    return row(name, fill, "of the row", **peer, goal=f">= {goal}", ok=fill >= goal, note=note)


def speed_row(lengths: np.ndarray, seed: int, repeats: int) -> dict:
    speeds = [len(lengths) / pack(lengths, [LENGTH], seed)[1] for _ in range(repeats)]
    note = f"median of {repeats}; mixture, shuffle and packing, one process"
    speed = float(np.median(speeds))
    return row("documents_per_s", speed, "documents/s", goal=">= 1000", ok=speed >= 1000, note=note)


def straggler_row(lengths: np.ndarray, seed: int, windows: int) -> dict:
    """Most loaded rank's FLOPs over the mean, per step."""
    cost = row_cost(baichuan_omni_7b())
    needs = np.pad(lengths, ((0, 0), (0, 5)))  # the other five budgets: text alone
    budgets = [LENGTH, *[1] * 5]

    def worst(window: int) -> np.ndarray:
        plan = StepPlan(plan_of(needs, budgets, seed), RANKS, window, cost, seed)
        steps = list(islice(plan, windows * WINDOW))
        sizes = [[[needs[number] for _, number in line] for line in step] for step in steps]
        flops = np.array(
            [[cost([DocumentLengths(0, tuple(n.tolist()), []) for n in line]) for line in step] for step in sizes]
        )
        return flops.max(1) / flops.mean(1)

    ordered, packed = worst(WINDOW), worst(1)
    mean = float(ordered.mean())
    note = f"{windows} windows of {WINDOW} steps, {RANKS} ranks; worst step {ordered.max():.3f}, in packed order "
    note += f"{packed.max():.3f}"
    peer = {"peer": "rows as packed", "peer_value": float(packed.mean()), "ratio": float(packed.mean()) / mean}
    return row("flops_straggler", mean, "max/mean", **peer, goal="<= 1.05", ok=mean <= 1.05, note=note)


def restore_row(lengths: np.ndarray, seed: int, planned: int) -> dict:
    needs, cost = np.pad(lengths, ((0, 0), (0, 5))), row_cost(baichuan_omni_7b())

    def make() -> StepPlan:
        return StepPlan(plan_of(needs, [LENGTH, *[1] * 5], seed), RANKS, WINDOW, cost, seed)

    plan, given, start = make(), 0, time.perf_counter()
    while given < planned or not plan.state["given"]:
        given += sum(map(len, next(plan)))
    planning = time.perf_counter() - start
    state = json.dumps(plan.state)
    expected = next(plan)
    start = time.perf_counter()
    again = make()
    again.restore(json.loads(state))
    found = next(again)
    seconds = time.perf_counter() - start
    assert found == expected
    note = (
        f"state of {len(state)} bytes after {given} documents (planned in {planning:.0f} s); with the step after it, "
    )
    note += f"which plans a window of {WINDOW} x {RANKS} rows again"
    return row("restore_s", seconds, "s", goal="<= 2", ok=seconds <= 2, note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--documents", type=int, default=60000)
    parser.add_argument("--peer-documents", type=int, default=12000, help="of them Grain packs so many, slowly")
    parser.add_argument("--planned", type=int, default=10_000_000, help="documents planned before the restore")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text, (media, budgets) = (
        documents(options.documents, options.seed),
        media_documents(options.documents, options.seed),
    )
    lines = [
        fill_row("fill_tokens", 0.998, text, [LENGTH], options.seed, options.peer_documents),
        fill_row("fill_three_budgets", 0.995, media, budgets, options.seed, options.peer_documents),
        speed_row(text, options.seed, options.repeats),
        straggler_row(text, options.seed, options.windows),
        restore_row(text, options.seed, options.planned),
    ]
    return emit(lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
