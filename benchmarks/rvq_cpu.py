"""Residual lookup on a CPU against torch.cdist + argmin, residual update included: time, and whether the codes agree.

    pip install -e '.[parity]' && JAX_PLATFORMS=cpu python benchmarks/rvq_cpu.py [--frames 512] [--repeats 7] [--json]

Time: 512 frames, codebooks 8192, 4096, 2048, 1024 x5 of width 5120, once for normal frames (the codes nearest to them
are hardly nearer than others: the most candidates) and once for frames that are sums of codes plus noise. Codebooks are
prepared once, as for the tokenizing of a data set; torch.cdist has no such form, and its own preparation (the codes'
norms) is a hundredth of its work. Both give the codes alone. The two take turns, with pauses for the threads of the
one to rest.

Codes: 8 kinds of frames (normal, or codes plus noise of 0.1, 0.5 and 2; at scales 1e-3, 1 and 1e3) at width 512, and
a share at the released sizes. At each level the distances to all codes, of the residual that our codes leave, are taken
in float64. A code is wrong if another is nearer by more than fp32 rounding: |x - c|^2 less by more than
2^-20 (|x|^2 + |c|^2), 16 units in the last place of the terms it is summed from. Where torch's code is another than
ours, the two must not differ by more than that either.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rows import emit, row

from baichuan_omni_jax.kernels.rvq_lookup import prepare_codebooks, rvq_lookup
from baichuan_omni_jax.kernels.rvq_lookup.reference import RELEASED, Case

NARROW = Case("narrow", 512, (4096, 2048, 2048))
KINDS = ((1.0, None), (1.0, 0.1), (1.0, 0.5), (1.0, 2.0), (1e-3, None), (1e-3, 0.5), (1e3, None), (1e3, 0.5))
ROUNDING = 2.0**-20
BLOCK = 1024

lookup = jax.jit(lambda x, codebooks: rvq_lookup(x, codebooks, implementation="xla")[0])
prepare = jax.jit(lambda codebooks: prepare_codebooks(codebooks, implementation="xla"))


def torch_lookup(x: torch.Tensor, codebooks: list[torch.Tensor]) -> torch.Tensor:
    residual, codes = x, []
    for codebook in codebooks:
        code = torch.cdist(residual, codebook).argmin(-1)
        residual = residual - codebook[code]
        codes.append(code)
    return torch.stack(codes, -1)


def frames(case: Case, rows: int, codebooks: list[np.ndarray], noise: float | None, seed: int) -> np.ndarray:
    """Codes plus noise; normal frames where `noise` is None."""
    if noise is None:
        return np.random.default_rng(seed).standard_normal((rows, case.width), np.float32)
    return case.frames(rows, codebooks, noise, seed)


def seconds(function, *args) -> float:
    time.sleep(0.3)
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def measure_time(name: str, noise: float | None, rows: int, repeats: int) -> dict:
    codebooks = RELEASED.codebooks()
    x = frames(RELEASED, rows, codebooks, noise, seed=1)
    ours = (jnp.asarray(x), prepare([jnp.asarray(book) for book in codebooks]))
    theirs = (torch.from_numpy(x), [torch.from_numpy(book) for book in codebooks])
    for warm_up in ((lookup, ours), (torch_lookup, theirs)):
        seconds(warm_up[0], *warm_up[1])
    pairs = [(seconds(lookup, *ours), seconds(torch_lookup, *theirs)) for _ in range(repeats)]
    mine, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    return row(
        f"rvq_cpu_{name}",
        mine,
        "s",
        peer="torch.cdist + argmin",
        peer_value=peer,
        ratio=peer / mine,
        goal=">= 2.5",
        ok=peer / mine >= 2.5,
        note=f"{rows} frames, released sizes, fp32; medians of {repeats} turns, {torch.get_num_threads()} threads",
    )


def count_codes(case: Case, x: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    """Looked up; wrong; with another code than torch's; and of these, with a difference beyond rounding."""
    codes = np.asarray(lookup(jnp.asarray(x), [jnp.asarray(book) for book in codebooks]))
    residual, counts = torch.from_numpy(x), np.zeros(4, int)
    for level, codebook in enumerate(map(torch.from_numpy, codebooks)):
        code = torch.from_numpy(codes[:, level].astype(np.int64))
        peer = torch.cdist(residual, codebook).argmin(-1)
        distances, allowed = exact_distances(residual, codebook)
        ours, theirs, limit = (
            table.gather(1, c[:, None])[:, 0] for table, c in ((distances, code), (distances, peer), (allowed, code))
        )
        wrong = ours - distances.amin(1) > limit
        other = code != peer
        apart = other & ((ours - theirs).abs() > limit)
        counts += [len(x), int(wrong.sum()), int(other.sum()), int(apart.sum())]
        residual = residual - codebook[code]
    return counts


def exact_distances(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (n, k): squared distances, and what fp32 rounding may change of them."""
    x, codebook = x.double(), codebook.double()
    lengths = (x * x).sum(1, keepdim=True) + (codebook * codebook).sum(1)
    return torch.addmm(lengths, x, codebook.T, alpha=-2), ROUNDING * lengths


def measure_codes(narrow_frames: int, released_frames: int) -> dict:
    counts = np.zeros(4, int)
    for case, total, kinds in ((NARROW, narrow_frames, KINDS), (RELEASED, released_frames, KINDS[:4])):
        codebooks = case.codebooks()
        each = -(-total // len(kinds))
        for seed, (scale, noise) in enumerate(kinds):
            x = frames(case, each, codebooks, noise, seed) * np.float32(scale)
            scaled = [book * np.float32(scale) for book in codebooks]
            for start in range(0, each, BLOCK):
                counts += count_codes(case, x[start : start + BLOCK], scaled)
    looked_up, wrong, other, apart = (int(count) for count in counts)
    return row(
        "rvq_cpu_codes",
        wrong + apart,
        "codes that differ beyond fp32 rounding",
        goal="== 0",
        ok=wrong + apart == 0,
        note=f"{narrow_frames} frames of width {NARROW.width} x {NARROW.sizes}, {released_frames} at released sizes, "
        f"{looked_up} codes: {wrong} not the nearest in float64; {other} other than torch.cdist's, {apart} of them "
        "beyond rounding",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--narrow-frames", type=int, default=98304)
    parser.add_argument("--released-frames", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with torch.inference_mode():
        rows = [
            measure_time("normal_frames", None, args.frames, args.repeats),
            measure_time("coded_frames", 0.5, args.frames, args.repeats),
            measure_codes(args.narrow_frames, args.released_frames),
        ]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
