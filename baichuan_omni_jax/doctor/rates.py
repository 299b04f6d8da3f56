"""What the devices reach beside what their kind can: matrix products, memory, and exchange between all of them.

Every local device is measured by itself, so that a slow one is seen, and must give the same bits as the first: a chip
that computes wrongly now and then is worse than one that does not start.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_omni_jax.doctor.report import Line, Setting, Verdict, join, sized
from baichuan_omni_jax.flops.terms import Chip, chip_of

# Shares of a peak below which a rate is worth a word, or is no rate of this chip. A collective over a part of a slice
# has a part of the links.
_MATMUL, _MEMORY, _LINKS, _BROKEN = 0.6, 0.6, 0.15, 0.1
# Of the median of all local devices: one below is slow.
_STRAGGLER = 0.85
_MOST_GATHERED = 2**28  # fp32 numbers, 1 GiB
_PRODUCTS = 8  # in one program, so that sending it counts for little


def check_rates(setting: Setting) -> Iterator[Line]:
    """Measures matrix products and memory of every local device."""
    devices, small = jax.local_devices(), jax.default_backend() == "cpu"
    chip = chip_of(devices[0].device_kind)
    # Devices of a CPU share its cores: one stands for all.
    measured = devices[:1] if small else devices

    # A chain of products, each from the one before, so that none can be left out.
    size, dtype = (512, jnp.float32) if small else (8192, jnp.bfloat16)
    multiply = jax.jit(partial(_chain, steps=_PRODUCTS))
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((size, size), np.float32) / np.sqrt(size)
    seconds, bits = [], []
    for device in measured:
        x = jax.device_put(jnp.asarray(matrix, dtype), device)
        seconds.append(_best(lambda x=x: multiply(x)) / _PRODUCTS)
        bits.append(np.asarray(multiply(x)[:8]).tobytes())
    peak = chip and chip.flops
    yield _rate_line("matmul", f"{size}^3 {jnp.dtype(dtype)}", 2 * size**3, seconds, peak, _MATMUL, "FLOP/s")
    yield _bits_line(bits)

    # Memory: read and write more than any cache holds.
    count = (2**24 if small else 2**29) // 4
    touch = jax.jit(lambda x: x * 1.5)
    seconds = []
    for device in measured:
        x = jax.device_put(jnp.ones(count, jnp.float32), device)
        seconds.append(_best(lambda x=x: touch(x)))
        del x
    peak = chip and chip.hbm_rate
    yield _rate_line("memory", f"{sized(8 * count)} read and written", 8 * count, seconds, peak, _MEMORY, "B/s")


def _chain(x: jax.Array, steps: int) -> jax.Array:
    return jax.lax.fori_loop(0, steps, lambda _, y: (x @ y).astype(x.dtype), x)


def _best(run: Callable[[], Any], repeats: int = 5) -> float:
    """Returns the least seconds of several calls after one that compiles: what else runs only adds."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def _rate_line(
    name: str, what: str, work: int | float, seconds: list[float], peak: float | None, least: float, unit: str
) -> Line:
    """Holds a rate to the peak, and the local devices to one another.

    Args:
        name: what is measured.
        what: its size, for the report.
        work: FLOPs or bytes of one call.
        seconds: of a call, by local device.
        peak: FLOP/s or bytes a second of one device; None: not known.
        least: the share of it below which the line warns.
        unit: of the rate.
    """
    rates = [work / each for each in seconds]
    usual = median(rates)
    text = f"{name}, {what}: {_written(usual, unit)}"
    values: dict[str, Any] = {f"{name}_rates": rates}
    slow = [f"device {place} ({_written(rate, unit)})" for place, rate in enumerate(rates) if rate < _STRAGGLER * usual]
    if peak is None:
        verdict = Verdict.OK
    else:
        share = usual / peak
        text += f", {share:.0%} of {_written(peak, unit)}"
        values |= {"peak": peak, "share": share}
        verdict = Verdict.OK if share >= least else Verdict.WARN if share >= _BROKEN else Verdict.FAIL
    advice = "" if verdict is Verdict.OK else "is something else running on it, or is it hot, or capped?"
    if slow:
        text += f"; slower than the others: {join(slow)}"
        verdict, advice = max(verdict, Verdict.WARN, key=list(Verdict).index), "every step waits for the slowest device"
    return Line("rates", verdict, text, advice, values)


def _written(rate: float, unit: str) -> str:
    return f"{sized(rate)}/s" if unit == "B/s" else f"{rate / 1e12:.3g} T{unit}"


def _bits_line(bits: list[bytes]) -> Line:
    odd = [f"device {place}" for place, each in enumerate(bits) if each != bits[0]]
    if odd:
        advice = "a chip that computes wrongly: have the machine replaced, and do not train on it"
        return Line("rates", Verdict.FAIL, f"the same product has other bits on {join(odd)} than on device 0", advice)
    return Line("rates", Verdict.OK, f"the same product has the same bits on {len(bits)} local devices")


def check_collectives(setting: Setting) -> Iterator[Line]:
    """Sums over, and gathers from, all devices of all hosts: the results, then the rate of each."""
    devices = jax.devices()
    if len(devices) == 1:
        yield Line("collectives", Verdict.OK, "one device: nothing is exchanged")
        return
    count = len(devices)
    chip = chip_of(devices[0].device_kind)
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Explicit,))
    # What each sends, and what a gather brings together on every device: that must fit on the largest slice too.
    numbers = (2**22 if jax.default_backend() == "cpu" else 2**26) // 4
    part = min(numbers, _MOST_GATHERED // count)
    # Device i holds i + 1 everywhere: whole numbers, whose sum is exact in any order.
    sharding = NamedSharding(mesh, P("all"))

    def numbered(place: Any) -> np.ndarray:
        return np.full((1, numbers), 1 + (place[0].start or 0), np.float32)

    x = jax.make_array_from_callback((count, numbers), sharding, numbered)
    total = count * (count + 1) / 2
    by_device = partial(jax.shard_map, mesh=mesh, in_specs=P("all"), check_vma=False)

    add = jax.jit(by_device(lambda x: jax.lax.psum(x, "all"), out_specs=P("all")))
    gather = jax.jit(by_device(partial(_gathered_ends, numbers=part), out_specs=P("all")))
    sums = [np.asarray(shard.data) for shard in add(x).addressable_shards]
    yield _result_line("all-reduce", all((part == total).all() for part in sums))
    ends = [np.asarray(shard.data) for shard in gather(x).addressable_shards]
    yield _result_line("all-gather", all((each == np.arange(1, count + 1)).all() for each in ends))

    # Rates as a device's links see them: a sum sends every number out and back, but for its own part.
    size = 4 * numbers
    own = (count - 1) / count
    yield _exchange_line("all-reduce", 2 * own * size, size, _best(lambda: add(x)), count, chip)
    sent = 4 * (count - 1) * part
    yield _exchange_line("all-gather", sent, 4 * count * part, _best(lambda: gather(x)), count, chip)


def _gathered_ends(x: jax.Array, numbers: int) -> jax.Array:
    """Gathers the first `numbers` of every device; returns the least and the largest of each device's, (2, devices)."""
    # Behind a barrier, or the ends might be taken before the gather, which would then move next to nothing.
    whole = jax.lax.optimization_barrier(jax.lax.all_gather(x[:, :numbers], "all"))
    return jnp.stack([whole.min((1, 2)), whole.max((1, 2))])


def _result_line(name: str, right: bool) -> Line:
    if right:
        return Line("collectives", Verdict.OK, f"{name}: the result is right")
    advice = "links or drivers are broken: no training is possible; on GPUs try NCCL_P2P_DISABLE=1"
    return Line("collectives", Verdict.FAIL, f"{name}: the result is WRONG", advice)


def _exchange_line(
    name: str, sent: int | float, size: int | float, seconds: float, count: int, chip: Chip | None
) -> Line:
    """Holds what a device sent to what its links can.

    Args:
        name: of the collective.
        sent: bytes that each device sends at least.
        size: bytes of what is summed or gathered, for the report.
        seconds: of a call.
        count: devices.
        chip: their kind; None: not known.
    """
    rate = sent / seconds
    text = f"{name} of {sized(size)} over {count} devices: {1e3 * seconds:.3g} ms, {sized(rate)}/s a device"
    values: dict[str, Any] = {"seconds": seconds, "rate": rate}
    if chip is None:
        return Line("collectives", Verdict.OK, text, values=values)
    share = rate / chip.link_rate
    text += f", {share:.0%} of all links' {sized(chip.link_rate)}/s"
    if share >= _LINKS:
        return Line("collectives", Verdict.OK, text, values=values | {"share": share})
    advice = "expected between machines; within a slice look at its shape, among GPUs at `nvidia-smi topo -m`"
    return Line("collectives", Verdict.WARN, text, advice, values | {"share": share})
