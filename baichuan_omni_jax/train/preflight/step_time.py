"""How long a step would take: predicted from what its program does and what the chips can do, never measured.

    step = products + kernels + memory + exposed exchanges

Products and kernels run at a share of the chip's peak, everything else at a share of its memory's rate, one after the
other. Exchanges that the program runs beside products cost nothing as long as these last. The shares are calibrated on
three published runs and checked on others (`benchmarks/published_steps.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.flops.terms import Chip, chip_of
from baichuan_omni_jax.train.preflight.hlo import collectives_of
from baichuan_omni_jax.train.preflight.hlo_work import copied_bytes, products_of
from baichuan_omni_jax.train.state import StepSpec

# Shares of a chip's bfloat16 peak that large products reach, by its name.
PRODUCT_SHARE = {"v4": 0.9, "v5e": 0.92, "v5p": 0.83, "v6e": 0.5, "tpu7x": 0.5}
# The same of the attention kernels, forward and backward, as their static schedules say (`kernel_schedule.py`).
KERNEL_SHARES = {"v6e": (0.8, 0.8), "tpu7x": (0.8, 0.8)}
_KERNEL_SHARES = 0.86, 0.95
MEMORY_SHARE = 0.85
# Dimensions of the torus, and what of the links' nominal rate arrives.
TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
LINK_SHARE = 0.9
# The shortest dimension whose ends are joined, where a slice covers it.
_JOINED = {"v5e": 16, "v6e": 16}
# Bytes a second between slices, a chip: a host's 200 Gbit/s over its four chips.
SLICE_RATE = 6.25e9


class Exchange(NamedTuple):
    """What a step exchanges of one kind: whole arrays of `bytes` in sum, among `members` along `dims` dimensions of the
    torus (of which all are rings where they are `joined`), or between slices (`dims` 0); beside products, if `hidden`.
    """

    kind: str
    bytes: float
    members: int
    dims: int
    joined: bool = True
    hidden: bool = False

    def seconds(self, chip: Chip) -> float:
        """Returns the time that it takes by itself."""
        if self.dims:
            rate = chip.link_rate / TORUS[chip.name] * LINK_SHARE
            rate *= self.dims * (1.0 if self.joined else 0.5)
        else:
            rate = SLICE_RATE
        # Each part passes every other member; a sum is scattered and then gathered. Of an exchange of all with all a
        # quarter passes a link, and a permutation uses one direction.
        share = {"all-reduce": 2.0, "all-to-all": 0.25, "collective-permute": 2.0}.get(self.kind, 1.0)
        return share * self.bytes * (self.members - 1) / self.members / rate


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one chip does in a step: FLOPs, recomputed ones and those of masked pairs included; bytes of everything that
    is no product or kernel; exchanges.
    """

    product_flops: float
    forward_flops: float = 0.0  # of attention's forward kernels
    backward_flops: float = 0.0
    memory_bytes: float = 0.0
    exchanges: Sequence[Exchange] = ()


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A predicted step, in seconds, and what follows: `mfu` by the model's FLOPs, `hfu` by all that are done."""

    products_s: float
    kernels_s: float
    memory_s: float
    exposed_s: float
    hidden_s: float
    total_s: float
    mfu: float
    hfu: float
    binds: str


def predict(work: Work, chip: Chip, model_flops: float) -> StepTime:
    """Predicts the time of a step that does `work` on each chip, `model_flops` of it for the model."""
    products = work.product_flops / (chip.flops * PRODUCT_SHARE[chip.name])
    forward, backward = KERNEL_SHARES.get(chip.name, _KERNEL_SHARES)
    kernels = (work.forward_flops / forward + work.backward_flops / backward) / chip.flops
    memory = work.memory_bytes / (chip.hbm_rate * MEMORY_SHARE)
    # What runs beside products is exposed only as far as it lasts longer.
    hidden = float(sum(each.seconds(chip) for each in work.exchanges if each.hidden))
    exposed = float(sum(each.seconds(chip) for each in work.exchanges if not each.hidden))
    exposed += max(0.0, hidden - products - kernels)
    total = products + kernels + memory + exposed
    done = work.product_flops + work.forward_flops + work.backward_flops
    parts = {"products": products, "attention kernels": kernels, "memory": memory, "exchanges": exposed}
    return StepTime(
        products_s=products,
        kernels_s=kernels,
        memory_s=memory,
        exposed_s=exposed,
        hidden_s=hidden,
        total_s=total,
        mfu=model_flops / total / chip.flops,
        hfu=done / total / chip.flops,
        binds=max(parts, key=lambda name: parts[name]),
    )


# FLOPs of attention's kernels beside those of its forward pass: two products a pair of a query and a key, then three
# for the queries' gradients and four for those of keys and values, or five for all in one.
_KERNEL_PRODUCTS = {"forward": 1.0, "dq": 1.5, "dkv": 2.0, "backward": 2.5}


def program_work(
    hlo: str, spec: StepSpec, omni: OmniConfig, counts: Mapping[str, float], visited: float, state_bytes: int
) -> Work:
    """Reads off a compiled step what one chip does.

    Args:
        hlo: the program's text.
        spec: the step: its mesh and run.
        omni: the model's sizes.
        counts: what the rows of a step hold (`Packing.counts`).
        visited: pairs of tokens in the blocks that attention's kernels visit, of all rows.
        state_bytes: parameters and optimizer state on a chip, which an update reads and writes.
    """
    run, mesh = spec.task.run, spec.mesh
    chips, products = mesh.devices.size, products_of(hlo)
    # Kernels: how often each runs, a layer and part of the batch; pairs in visited blocks beside those that are seen.
    seen = {"llm": visited, "vision": counts["patch_pairs"]}
    width = {"llm": omni.llm.num_heads * omni.llm.head_dim, "vision": omni.vision.embed_dim}
    passes = dict.fromkeys(("forward", "backward"), 0.0)
    for product in (each for each in products if each.kernel):
        tower = "vision" if "vision" in product.scope else "llm"
        kind = product.kernel.removesuffix("_kernel")
        flops = 4.0 * width[tower] * seen[tower] / chips / run.train.accumulate * product.times
        passes["forward" if kind == "forward" else "backward"] += flops * _KERNEL_PRODUCTS.get(kind, 1.0)

    # Memory: what norms, rotations, activations and sums of a layer read and write, forward, again, and twice backward;
    # copies; parameters and moments.
    llm, tokens = omni.llm, counts["tokens"] / chips
    layer = 8 * llm.hidden_size + 4 * width["llm"] + 3 * llm.intermediate_size
    stream = 2 * tokens * llm.num_layers * layer * (3 + (run.compute.remat != "none"))
    exchanges = [
        Exchange(one.kind, one.bytes * one.times, *torus_dims(mesh.devices, mesh.axis_names, one.axes), one.hidden)
        for one in collectives_of(hlo, dict(mesh.shape))
    ]
    return Work(
        product_flops=float(sum(each.flops * each.times for each in products)),
        forward_flops=passes["forward"],
        backward_flops=passes["backward"],
        memory_bytes=stream + 2.0 * copied_bytes(hlo) + 2.0 * state_bytes,
        exchanges=exchanges,
    )


def torus_dims(devices: np.ndarray, axes: Sequence[str], names: Sequence[str]) -> tuple[int, int, bool]:
    """Returns (members, dims, joined) of an exchange (`Exchange`); dims is 0 between slices.

    `devices` are a mesh's with these `axes`; they exchange over those of `names`.
    """
    # The devices that exchange with the mesh's first one.
    group = devices[tuple(slice(None) if axis in names else 0 for axis in axes)].ravel()
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return len(group), 0, False
    places, whole = (np.array([device.coords for device in some]) for some in (group, devices.ravel()))
    used, there = (np.array([len(np.unique(some[:, dim])) for dim in range(some.shape[1])]) for some in (places, whole))
    # A part of a dimension is a line, and so is one that is too short to be joined.
    chip = chip_of(devices.flat[0].device_kind)
    joined = (used == there) & (there >= _JOINED.get(chip.name if chip else "", 4))
    return len(group), max(int((used > 1).sum()), 1), bool(joined[used > 1].all())
