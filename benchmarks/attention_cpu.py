"""How fast is attention on a CPU, against torch run document by document and against JAX's own masked attention?

    pip install -e '.[parity]' && python benchmarks/attention_cpu.py [--length 4096] [--repeats 3] [--json]

Forward and backward of 28 query and 4 key heads of 128, fp32. torch has no packed attention on a CPU, so it gets each
document by itself, causal, on all cores, with the key heads repeated or with `enable_gqa=True`, whichever is faster
here (the row says which). All are run in turns in this process; a row's value is the median of our time, its ratio the
median of ours over theirs in the same turn.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
from rows import emit, row
from torch.nn.functional import scaled_dot_product_attention

from baichuan_omni_jax.kernels.flash_attention import flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, Case
from baichuan_omni_jax.kernels.flash_attention.reference import visible


def ours(case: Case, block: int):
    """One jitted forward and backward: gradients of q, k, v."""
    segments, scale = case.segments(), LLM.head_dim**-0.5

    @jax.jit
    def step(q, k, v, cotangent):
        plan = plan_blocks(segments, causal=True, block_q=block, block_kv=block)
        attend = lambda q, k, v: flash_attention(  # noqa: E731
            q, k, v, segments=segments, plan=plan, causal=True, scale=scale, implementation="xla"
        )
        return jax.vjp(attend, q, k, v)[1](cotangent)

    return on_arrays(step, case)


def masked(case: Case):
    segments = case.segments()

    @jax.jit
    def step(q, k, v, cotangent):
        mask = visible(segments, causal=True)[:, None]
        return jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, mask=mask), q, k, v)[1](cotangent)

    return on_arrays(step, case)


def on_arrays(step, case: Case):
    arrays = case.arrays()
    return lambda: jax.block_until_ready(step(*arrays))


def by_document(case: Case, repeat: bool):
    """torch, one document after the other; `repeat`: key heads repeated before, else `enable_gqa`."""
    q, k, v, cotangent = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in case.arrays())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = LLM.heads // LLM.kv_heads

    def run():
        out, start = [], 0
        for size in case.documents[0]:
            one = [x[:, :, start : start + size] for x in leaves]
            if repeat:
                one[1:] = (x.repeat_interleave(group, 1) for x in one[1:])
            out.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=not repeat))
            start += size
        return torch.autograd.grad(torch.cat(out, 2), leaves, cotangent)

    return run


def check(case: Case, gradients, peers) -> None:
    """Exits when our gradients are not torch's: a fast wrong answer is no measurement."""
    for name, one, other in zip("qkv", gradients, peers, strict=True):
        want = other.transpose(1, 2).numpy()
        error = np.abs(np.asarray(one) - want).max() / np.abs(want).max()
        if not error < 1e-4:
            sys.exit(f"{case.name}: the gradient of {name} differs from torch's by {error:.1e}")


def fastest_torch(case: Case):
    """torch with key heads repeated or with `enable_gqa`, whichever took less for one run after a first; its name."""
    runs = {"torch, repeated key heads": by_document(case, True), "torch, enable_gqa": by_document(case, False)}
    seconds = in_turns(runs, 1)
    name = min(runs, key=lambda name: seconds[name][0])
    return name, runs[name]


def in_turns(runs: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, one of each per turn, after a turn that is not counted."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(case: Case, seconds: dict, peer: str, goal: float, *, faster: bool, note: str) -> dict:
    """A row: our time over the peer's (`faster`: the peer's over ours), the median over the turns."""
    pairs = zip(seconds["ours"], seconds[peer], strict=True)
    ratio = statistics.median(theirs / mine if faster else mine / theirs for mine, theirs in pairs)
    return row(
        f"{case.name} against {peer}",
        statistics.median(seconds["ours"]),
        "s",
        peer=peer,
        peer_value=statistics.median(seconds[peer]),
        ratio=ratio,
        goal=f">= {goal}" if faster else f"<= {goal}",
        ok=ratio >= goal if faster else ratio <= goal,
        note=note,
    )


def measure(length: int, block: int, repeats: int) -> list[dict]:
    packed = Case("4 documents", LLM, length, block, ((length // 4,) * 4,))
    single = Case("1 document", LLM, length, block, ((length,),))
    note = f"S {length}, block {block}, {os.cpu_count()} threads, jax {jax.__version__}, torch {torch.__version__}"
    rows = []
    for case, goal in ((packed, 1.5), (single, 1.2)):
        name, peer = fastest_torch(case)
        runs = {"ours": ours(case, block), name: peer}
        if case is packed:
            runs["jax.nn.dot_product_attention"] = masked(case)
        check(case, runs["ours"](), peer())
        seconds = in_turns(runs, repeats)
        rows.append(compare(case, seconds, name, goal, faster=False, note=note))
        if case is packed:
            rows.append(compare(case, seconds, "jax.nn.dot_product_attention", 5, faster=True, note=note))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument(
        "--block", type=int, default=256, help="of the plan; 256 takes about a tenth less processor time than 512"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    return emit(measure(options.length, options.block, options.repeats), options.json)


if __name__ == "__main__":
    sys.exit(main())
