"""Which kind of device a computation is for, and what a kernel says when it cannot run there."""

import jax
from jaxtyping import Array


class UnsupportedError(ValueError):
    """An implementation was asked for by name and cannot run; the message says why."""


def platform_of(x: Array) -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh of `x` (also while compiling for absent devices), or the default."""
    for mesh in (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform:
            return "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return jax.default_backend()
