"""The back ends of kernels by name, the device that each needs, and the choice among them."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
from jaxtyping import Array

Implementation = Literal["pallas_tpu", "pallas_gpu", "xla", "reference"]
Platform = Literal["cpu", "gpu", "tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

# Back ends for one kind of device; the others run anywhere.
NEEDED_PLATFORM: dict[str, Platform] = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
# What `implementation=None` tries, first to last. The last one of each computes anything.
PREFERRED: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("pallas_gpu", "xla"),
    "cpu": ("xla",),
}


class UnsupportedError(ValueError):
    """An implementation was asked for by name and cannot run; the message says why."""


def platform_of(x: Array) -> str:
    """Returns `cpu`, `gpu` or `tpu`: of the mesh of `x` (also while compiling for absent devices), or the default."""
    # Ahead-of-time compilation names an absent device on an abstract mesh; else the default back end runs.
    for mesh in (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform:
            return "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return jax.default_backend()


def check_implementation(kernel: str, name: str | None) -> None:
    """Raises ValueError where `name` is no back end's (None: to be chosen)."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"{kernel} implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")


def check_platform(kernel: str, name: str | None, platform: str) -> None:
    """Raises UnsupportedError where the back end `name` needs another kind of device than `platform`."""
    needed = NEEDED_PLATFORM.get(name or "", platform)
    if needed != platform:
        raise UnsupportedError(f"{kernel} {name} needs a {needed}; this runs on {platform}")


def choose(
    name: Implementation | None, platform: str, what: str, reason_against: Callable[[Implementation], str | None]
) -> Implementation:
    """Returns the back end to run: `name`, or the first of the platform's preferred ones that can compute this.

    Args:
        name: the implementation that was asked for; None chooses. A name never falls back to another.
        platform: `cpu`, `gpu` or `tpu`.
        what: the start of the error's sentence: "attention {name} cannot compute q (1, 8, 2, 64)".
        reason_against: why a back end cannot compute these arguments; None where it can.

    Raises:
        UnsupportedError: the named implementation cannot compute them.
    """
    if name is None:
        return next(tried for tried in PREFERRED[platform] if reason_against(tried) is None)
    if (reason := reason_against(name)) is not None:
        raise UnsupportedError(f"{what.format(name=name)}: {reason}")
    return name
