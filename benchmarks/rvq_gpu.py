"""How fast is the residual lookup on a GPU, against torch.cdist and argmin level by level?

    pip install -e '.[parity]' 'jax[cuda12]' && python benchmarks/rvq_gpu.py [--frames 8192] [--repeats 20] [--json]

Codebooks of the released sizes and frames near their codes, fp32. torch (on the same GPU, TF32 off) and ours run in
turns in this process. Codes count as the same where the two nearest differ by no more than fp32 rounds. Without a GPU
it says so and exits 1.
"""

import argparse
import os
import statistics
import sys
import time
from importlib.metadata import version

# torch needs its share of the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from rows import emit, row

from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from baichuan_omni_jax.kernels.rvq_lookup.reference import RELEASED, Case

OURS = "pallas_gpu"
# Two codes whose squared distances differ by less, of the distance, are equally near in fp32.
ROUNDING = 1e-5


def ours(x: np.ndarray, codebooks: list[np.ndarray]):
    lookup = jax.jit(lambda x, codebooks: rvq_lookup(x, codebooks, implementation=OURS)[0])
    x, codebooks = jax.device_put((x, codebooks))
    return lambda: jax.block_until_ready(lookup(x, codebooks))


def by_cdist(x: np.ndarray, codebooks: list[np.ndarray], device: str):
    # Only here: without a GPU there is no need of torch to say so.
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU: install its CUDA build; nothing was measured")
    torch.backends.cuda.matmul.allow_tf32 = False
    x, *codebooks = (torch.tensor(array, device=device) for array in (x, *codebooks))

    def run():
        residual, codes = x, []
        for codebook in codebooks:
            codes.append(torch.cdist(residual, codebook).argmin(1))
            residual = residual - codebook[codes[-1]]
        codes = torch.stack(codes, 1)
        if device == "cuda":
            torch.cuda.synchronize()
        return codes

    return run


def really_different(x: np.ndarray, codebooks: list[np.ndarray], mine: np.ndarray, theirs: np.ndarray) -> int:
    """Frames whose codes first differ at a level where one of the two is nearer by more than fp32 rounds."""
    count = 0
    for frame in np.flatnonzero((mine != theirs).any(1)):
        level = int(np.argmax(mine[frame] != theirs[frame]))
        residual = x[frame].astype(np.float64)
        for earlier in range(level):
            residual -= codebooks[earlier][mine[frame, earlier]]
        one, other = (((residual - codebooks[level][codes[frame, level]]) ** 2).sum() for codes in (mine, theirs))
        count += abs(one - other) > ROUNDING * max(one, other)
    return count


def in_turns(runs: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each run, one of each per turn, after a turn that is not counted."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(case: Case, frames: int, repeats: int, device: str) -> list[dict]:
    codebooks = case.codebooks()
    x = case.frames(frames, codebooks, noise=1.0)
    runs = {"ours": ours(x, codebooks), "torch": by_cdist(x, codebooks, device)}
    mine, theirs = np.asarray(runs["ours"]()), runs["torch"]().cpu().numpy()
    different, ties = really_different(x, codebooks, mine, theirs), int((mine != theirs).any(1).sum())
    seconds = in_turns(runs, repeats)
    ratio = seconds["torch"] / seconds["ours"]
    return [
        row(
            "frames with another code than torch's",
            different,
            "frames",
            goal="== 0",
            ok=different == 0,
            note=f"of {frames}; {ties - different} more where two codes are equally near in fp32",
        ),
        row(
            f"lookup of {frames} frames, {len(codebooks)} levels",
            1e3 * seconds["ours"],
            "ms",
            peer="torch.cdist + argmin",
            peer_value=1e3 * seconds["torch"],
            ratio=ratio,
            goal=">= 1.5",
            ok=ratio >= 1.5,
            note=f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {version('torch')}",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"no GPU: JAX runs on {jax.default_backend()} here; nothing was measured")
    return emit(measure(RELEASED, args.frames, args.repeats, "cuda"), args.json)


if __name__ == "__main__":
    sys.exit(main())
