"""Every kernel against its reference, on the device and by the back end that training would take: values and gradients.

Attention has the released heads at their real widths over packed rows whose blocks are out of order, as context
parallelism deals them. Rows are short, so that the reference, which writes everything out, fits and ends in seconds.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.doctor.report import Line, Setting, Verdict
from baichuan_omni_jax.flops.terms import chip_of
from baichuan_omni_jax.kernels import flash_attention as attention_door
from baichuan_omni_jax.kernels import rvq_lookup as lookup_door
from baichuan_omni_jax.kernels.backends import PREFERRED, Implementation
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, VIT, WHISPER, Case, log_normal
from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan
from baichuan_omni_jax.kernels.rvq_lookup import reference as lookup_reference

# Of the largest value of the fp32 reference. bf16 rounds the softmax's weights and the results, each to 8 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
HEADS = {"llm": LLM, "vit": VIT, "whisper": WHISPER}
ARRAYS = ("values", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v")
# Microseconds of one pair of blocks of 512, of one key head's group of 7 query heads, on one of the chip's cores: the
# forward kernel, dq, dk with dv. Read off the compiler's instruction bundles, where stalls are not counted.
PREDICTED_US = {"v5p": (5.6, 6.6, 8.5)}
_CORES = {"v4": 2, "v5p": 2}  # of one JAX device, which share out the groups
# Products of a visited pair: scores and weighted values; these again and the four of the gradients.
_FORWARD, _BACKWARD = 2, 7
# Slower than predicted by more than this, or below this share of the peak: worth a profile.
_SLOWER, _LEAST_SHARE = 1.5, 0.2


def check_kernels(setting: Setting) -> Iterator[Line]:
    """Holds attention of every kind of head, and the residual lookup, to what they mean."""
    small = jax.default_backend() == "cpu"
    for name, heads in HEADS.items():
        # On a CPU sizes that compile and run in seconds; else several blocks of the size that training takes.
        length, block = (256, 64) if small else (2048, 512)
        documents = ((length // 2 + 20, 7, length // 4), log_normal(length - block // 2, length // 3))
        case = Case(name, heads, length, block, documents, permuted=True)
        # What training computes in on this device; on an accelerator fp32 once, to show errors that bf16 would hide.
        dtypes = ("float32",) if small else ("bfloat16", "float32") if name == "llm" else ("bfloat16",)
        for dtype in dtypes:
            yield compare_attention(case, dtype)
    yield compare_lookup(small)


def compare_attention(case: Case, dtype: str) -> Line:
    """Runs attention of a case as training would, and the whole score matrix in fp32; says how far they are apart."""
    heads, segments = case.heads, case.segments()
    # The reference reads the same rounded numbers, and computes them exactly.
    arrays = case.arrays(jnp.dtype(dtype))
    exact = [array.astype(jnp.float32) for array in arrays]
    plan = jax.jit(lambda: attention_door.plan_blocks(segments, heads.causal, case.block, case.block))()
    chosen, passed_over = back_end(arrays[0], arrays[1], plan)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((*segments.q_ids.shape, heads.heads)), jnp.float32)

    def run(implementation: Implementation | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            out, lse = attention_door.flash_attention(
                q,
                k,
                v,
                segments=segments,
                plan=plan,
                causal=heads.causal,
                implementation=implementation,
                return_lse=True,
            )
            # Both results are used, so that both have a gradient; padding's log-sum-exp is a mark and no number.
            lse = jnp.where(segments.q_ids[..., None] > 0, lse, 0.0)
            return (out.astype(jnp.float32) * arrays[3]).sum() + (lse * weights).sum(), (out, lse)

        (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays[:3])
        return *results, *gradients

    ours = jax.jit(lambda *arrays: run(None, *arrays))(*arrays)
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(lambda *arrays: run("reference", *arrays))(*exact)
    errors = {name: _distance(*pair) for name, pair in zip(ARRAYS, zip(ours, theirs, strict=True), strict=True)}

    what = f"attention {case.name} {heads.heads}/{heads.kv_heads} heads of {heads.head_dim}, {dtype}, {chosen}"
    return _verdict(what, errors, TOLERANCE[dtype], passed_over)


def back_end(q: jax.Array, k: jax.Array, plan: BlockPlan) -> tuple[str, str]:
    """Returns the back end that attention takes here, and why none of the better ones."""
    passed_over = []
    for name in PREFERRED[jax.default_backend()]:
        reason = attention_door.BACK_ENDS[name].unsupported(q, k, plan)
        if reason is None:
            return name, "; ".join(passed_over)
        passed_over.append(f"{name}: {reason}")
    return "none", "; ".join(passed_over)


def compare_lookup(small: bool) -> Line:
    """Looks vectors of the released width up, and compares codes, what they sum to and the norms of what is left."""
    # Random codes are far apart at this width: the nearest is not a matter of rounding.
    sizes = tuple(size // 32 for size in lookup_reference.RELEASED.sizes) if small else lookup_reference.RELEASED.sizes
    case = lookup_reference.Case("released width", lookup_reference.RELEASED.width, sizes)
    codebooks = [jnp.asarray(codebook) for codebook in case.codebooks()]
    x = jnp.asarray(case.frames(16, [np.asarray(codebook) for codebook in codebooks], noise=0.1))
    name = next(
        name for name in PREFERRED[jax.default_backend()] if not lookup_door.BACK_ENDS[name].unsupported(x, codebooks)
    )
    ours = jax.jit(lambda x, books: lookup_door.rvq_lookup(x, books))(x, codebooks)
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(lambda x, books: lookup_door.rvq_lookup(x, books, implementation="reference"))(x, codebooks)
    wrong = int((np.asarray(ours[0]) != np.asarray(theirs[0])).sum())
    errors = {"codes": float(wrong), "sums": _distance(ours[1], theirs[1]), "norms": _distance(ours[2], theirs[2])}
    what = f"RVQ lookup, {len(sizes)} levels, width {case.width}, float32, {name}"
    better = PREFERRED[jax.default_backend()][0]
    return _verdict(what, errors, TOLERANCE["float32"], f"{better} cannot compute this" if name != better else "")


def _distance(ours: Any, theirs: Any) -> float:
    """Returns the largest difference, of the largest value of `theirs`; infinite where one is no number."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    error = np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-30)
    return float(np.nan_to_num(error, nan=np.inf))


def _verdict(what: str, errors: dict[str, float], limit: float, passed_over: str) -> Line:
    worst = max(errors, key=lambda name: errors[name])
    text = f"{what}: {worst} off by {errors[worst]:.1e} of the largest, at most {limit:.0e} allowed"
    if not errors[worst] <= limit:
        wrong = ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit)
        advice = "do not train with it: --set compute.attention=xla computes the same; report chip and versions"
        return Line("kernels", Verdict.FAIL, f"{what}: WRONG by {wrong} (allowed {limit:.0e})", advice, errors)
    if passed_over:
        return Line(
            "kernels", Verdict.WARN, f"{text} ({passed_over})", "it is right, but slower than it could be", errors
        )
    return Line("kernels", Verdict.OK, text, values=errors)


def check_kernel_times(setting: Setting) -> Iterator[Line]:
    """Times attention, and says what was predicted, or which share of the peak it reaches.

    Of every kind of head; on a CPU of the language model's alone, once, as there is nothing to hold them against.
    """
    small = jax.default_backend() == "cpu"
    length, block = (256, 128) if small else (16384, 512)
    chip = chip_of(jax.devices()[0].device_kind)
    for name, heads in HEADS.items():
        if small and name != "llm":
            continue
        mean = {"llm": length // 4, "vit": length // 16, "whisper": length // 10}[name]
        case = Case(name, heads, length, block, (log_normal(length, mean),))
        visited, seconds = time_attention(case, jnp.float32 if small else jnp.bfloat16, repeats=1 if small else 10)
        yield _time_line(case, visited, seconds, chip)


def time_attention(case: Case, dtype: Any, repeats: int) -> tuple[int, tuple[float, float]]:
    """Returns the pairs of blocks that are visited, and seconds of the forward pass and of forward with backward."""
    heads, segments = case.heads, case.segments()
    plan = jax.jit(lambda: attention_door.plan_blocks(segments, heads.causal, case.block, case.block))()

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention_door.flash_attention(q, k, v, segments=segments, plan=plan, causal=heads.causal)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        out, gradients = jax.vjp(attend, q, k, v)
        return out, *gradients(cotangent)

    q, k, v, cotangent = case.arrays(dtype)
    seconds = (
        timed(jax.jit(attend), q, k, v, repeats=repeats),
        timed(jax.jit(both), q, k, v, cotangent, repeats=repeats),
    )
    return int(plan.count.sum()), seconds


def timed(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Returns seconds of a call, over several that are sent one after the other, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    results = [function(*arguments) for _ in range(repeats)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / repeats


def _time_line(case: Case, visited: int, seconds: tuple[float, float], chip: Any) -> Line:
    """Holds times to the prediction for this chip where there is one, else to what the chip can do at most."""
    heads = case.heads
    forward, backward = (1e6 * time for time in (seconds[0], max(seconds[1] - seconds[0], 0.0)))
    text = f"attention {case.name}, {case.length} tokens: forward {forward:.0f} µs, backward {backward:.0f} µs"
    text += f" ({forward / visited:.1f} and {backward / visited:.1f} a pair of blocks of {case.block})"
    values: dict[str, Any] = {"forward_us": forward, "backward_us": backward, "visited": visited}
    if chip is None:
        return Line("kernel times", Verdict.OK, text, values=values)

    # At the peak: what the visited blocks multiply, whole blocks, as the kernels do.
    work = 2 * case.block**2 * heads.heads * heads.head_dim * visited
    share = work * (_FORWARD + _BACKWARD) / (seconds[1] * chip.flops)
    text += f", {share:.0%} of the chip's peak"
    values["share_of_peak"] = share
    if case.name == "llm" and chip.name in PREDICTED_US:
        groups = heads.kv_heads / _CORES.get(chip.name, 1)
        predicted = [visited * groups * each for each in PREDICTED_US[chip.name]]
        wanted = predicted[0], predicted[1] + predicted[2]
        values["predicted_us"] = wanted
        text += f"; predicted {wanted[0]:.0f} and {wanted[1]:.0f} µs"
        late = forward > _SLOWER * wanted[0] or backward > _SLOWER * wanted[1]
    else:
        late = share < _LEAST_SHARE
    if late:
        advice = "take a profile (train --profile 10:13), and see whether other blocks help (compute.attention_block)"
        return Line("kernel times", Verdict.WARN, text, advice, values)
    return Line("kernel times", Verdict.OK, text, values=values)
