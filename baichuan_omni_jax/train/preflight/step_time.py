"""How long a step would take: predicted from what its program does and what the chips can do, never measured.

    step = products + kernels + memory + exposed exchanges

Products and kernels run at a share of the chip's peak, everything else at a share of its memory's rate, one after the
other. Exchanges that the program runs beside products cost nothing as long as these last. The shares are calibrated on
three published runs and checked on others (`benchmarks/published_steps.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from baichuan_omni_jax.flops.terms import Chip

# Shares of a chip's bfloat16 peak that large products reach, by its name.
PRODUCT_SHARE = {"v4": 0.9, "v5e": 0.92, "v5p": 0.83, "v6e": 0.55, "tpu7x": 0.55}
# The same of the attention kernels, forward and backward: of v5p what their static schedule says; v6e and tpu7x have
# units twice as wide as a head.
KERNEL_SHARES = {"v6e": (0.45, 0.55), "tpu7x": (0.45, 0.55)}
_KERNEL_SHARES = 0.77, 0.95
MEMORY_SHARE = 0.85
# Dimensions of the torus, and what of the links' nominal rate arrives.
TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
LINK_SHARE = {"v6e": 0.8}
_LINK_SHARE = 0.9
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
            rate = chip.link_rate / TORUS[chip.name] * LINK_SHARE.get(chip.name, _LINK_SHARE)
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
    hidden = sum(each.seconds(chip) for each in work.exchanges if each.hidden)
    exposed = sum(each.seconds(chip) for each in work.exchanges if not each.hidden)
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


def torus_dims(mesh: Mesh, names: Sequence[str], chip: Chip) -> tuple[int, int, bool]:
    """Returns (members, dims, joined) of an exchange over mesh axes `names` (`Exchange`); dims is 0 between slices."""
    members = math.prod(mesh.shape[name] for name in names)
    # The devices that exchange with the mesh's first one.
    group = mesh.devices[tuple(slice(None) if name in names else 0 for name in mesh.axis_names)].ravel()
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return members, 0, False
    places, whole = (np.array([_place(device) for device in some]) for some in (group, mesh.devices.ravel()))
    used = np.array([len(np.unique(places[:, dim])) for dim in range(places.shape[1])])
    there = np.array([len(np.unique(whole[:, dim])) for dim in range(whole.shape[1])])
    # A part of a dimension is a line, and so is one that is too short to be joined.
    joined = (used == there) & (there >= _JOINED.get(chip.name, 4))
    return members, max(int((used > 1).sum()), 1), bool(joined[used > 1].all())


def _place(device: Any) -> Sequence[int]:
    return device.coords
