"""TPU slices that are not there: their devices, described by libtpu."""

from importlib.util import find_spec

import jax
from jax.experimental import topologies

from baichuan_omni_jax.errors import ConfigError

# A v4 chip's two cores are one JAX device, as on a v4 slice itself.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices of a topology such as `v5p:4x4x4`.

    Raises ConfigError when libtpu is missing or does not know the topology.
    """
    if slices < 1:
        raise ConfigError(f"mesh.slices must be at least 1, not {slices}")
    if find_spec("libtpu") is None:
        raise ConfigError("libtpu is not installed: pip install 'baichuan_omni_jax[preflight]'")
    options = _OPTIONS.get(topology.partition(":")[0], {})
    if slices > 1:
        options = options | {"num_slices": slices}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"--topology {topology} is not one that libtpu knows (such as v5p:4x4x4, v5e:4x8, v6e:4x8): {why}"
        ) from error
