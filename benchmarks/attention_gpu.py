"""How fast is attention on a GPU: does a packed row cost what its documents cost, and how far is it from cuDNN?

    pip install -e . 'jax[cuda12]' && python benchmarks/attention_gpu.py [--length 65536] [--block 128] [--json]

Forward and backward of 28 query and 4 key heads of 128, bf16. First the kernels run every small case in fp32 and are
held to the whole score matrix; then one document and sixteen in the same row are timed, and cuDNN's causal attention
(`jax.nn.dot_product_attention`) on the one document, in turns in this process. cuDNN's FLOPs and ours are counted
alike: what the causal triangle needs. The plan is built before, as a model builds it once for all its layers.
Without a GPU it says so and exits 1.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rows import emit, row

from baichuan_omni_jax.kernels.flash_attention import flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, SMALL, Case

OURS, CUDNN = "pallas_gpu", "cudnn"
# Forward: scores and their product with v. Backward: these scores again, and the four products of the gradients.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def packed(case: Case, dtype, implementation: str, block: int):
    """Output and gradients of packed attention, on this case's arrays."""
    segments, heads = case.segments(), case.heads
    plan = jax.jit(lambda: plan_blocks(segments, heads.causal, block, block))()

    @jax.jit
    def step(q, k, v, cotangent, segments, plan):
        def attend(q, k, v):
            return flash_attention(
                q,
                k,
                v,
                segments=segments,
                plan=plan,
                causal=heads.causal,
                scale=heads.head_dim**-0.5,
                implementation=implementation,
            )

        out, gradients = jax.vjp(attend, q, k, v)
        return out, *gradients(cotangent)

    arrays = case.arrays(dtype)
    return lambda: jax.block_until_ready(step(*arrays, segments, plan))


def one_document(case: Case, dtype, implementation: str):
    """The same of JAX's own attention, for a row that is one document."""

    @jax.jit
    def step(q, k, v, cotangent):
        attend = lambda *x: jax.nn.dot_product_attention(*x, is_causal=True, implementation=implementation)  # noqa: E731
        out, gradients = jax.vjp(attend, q, k, v)
        return out, *gradients(cotangent)

    arrays = case.arrays(dtype)
    return lambda: jax.block_until_ready(step(*arrays))


def worst_error(one, other) -> float:
    """Largest difference between two sets of results, of each one's largest value; infinite where one is no number."""
    pairs = zip(*(jax.tree.map(lambda x: np.asarray(x, np.float32), side) for side in (one, other)), strict=True)
    errors = [np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-30) for mine, theirs in pairs]
    return float(np.nan_to_num(np.max(errors), nan=np.inf))


def check_cases() -> dict:
    with jax.default_matmul_precision("highest"):
        errors = {
            name: worst_error(*(packed(case, jnp.float32, side, case.block)() for side in (OURS, "reference")))
            for name, case in SMALL.items()
        }
    name = max(errors, key=errors.get)
    return row(
        "small cases, fp32: largest error",
        errors[name],
        "of the largest value",
        goal="<= 1e-05",
        ok=errors[name] <= 1e-5,
        note=f"{len(errors)} cases, values and gradients against the whole score matrix; worst: {name}",
    )


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


def measure(length: int, documents: int, block: int, repeats: int) -> list[dict]:
    single = Case("1 document", LLM, length, block, ((length,),))
    many = Case(f"{documents} documents", LLM, length, block, ((length // documents,) * documents,))
    runs = {
        "single": packed(single, jnp.bfloat16, OURS, block),
        "many": packed(many, jnp.bfloat16, OURS, block),
        "cudnn": one_document(single, jnp.bfloat16, CUDNN),
    }
    error = worst_error(runs["single"](), runs["cudnn"]())
    if not error < 3e-2:
        sys.exit(f"{single.name}: our values or gradients differ from cuDNN's by {error:.1e} of the largest")
    seconds = {name: statistics.median(times) for name, times in in_turns(runs, repeats).items()}
    products = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
    tflop = products * 2 * (length**2 / 2) * LLM.heads * LLM.head_dim / 1e12
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, blocks of {block}"
    ratio = seconds["many"] / seconds["single"]
    speed = seconds["cudnn"] / seconds["single"]
    return [
        row(
            f"{many.name} of {length // documents}, forward + backward",
            1e3 * seconds["many"],
            "ms",
            peer=f"one document of {length}, ours",
            peer_value=1e3 * seconds["single"],
            ratio=ratio,
            goal="<= 0.125",
            ok=ratio <= 0.125,
            note=device,
        ),
        row(
            f"one document of {length}, forward + backward",
            tflop / seconds["single"],
            "TFLOP/s",
            peer="cuDNN",
            peer_value=tflop / seconds["cudnn"],
            ratio=speed,
            goal=">= 0.7",
            ok=speed >= 0.7,
            note=f"largest difference from cuDNN {error:.1e}; {device}",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"no GPU: JAX runs on {jax.default_backend()} here; nothing was measured")
    rows = [check_cases(), *measure(args.length, args.documents, args.block, args.repeats)]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
