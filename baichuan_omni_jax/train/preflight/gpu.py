"""NVIDIA GPUs that are not there, described for XLA: what it must know of one to compile for it."""

from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from baichuan_omni_jax.errors import ConfigError

# What JAX takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (its default is 0.75): the rest is CUDA's
# own, and what its libraries allocate.
USABLE_SHARE = 0.95
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

# By the name in a topology: `GpuTargetConfigProto` of XLA as text, with what CUDA's device query says of the device.
_TARGETS = {
    "h100": """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def is_gpu(topology: str) -> bool:
    """Whether a topology is of GPUs that are described here: `h100:1`, `h100:8`."""
    return topology.partition(":")[0] in _TARGETS


def gpus_of(topology: str) -> list[Any]:
    """Lists the devices of one host with `NAME:COUNT` GPUs.

    Raises ConfigError where JAX's CUDA plugin is missing, or the count is none.
    """
    name, _, count = topology.partition(":")
    if not count.isdecimal() or not int(count):
        raise ConfigError(f"--topology {topology} is not a number of GPUs, such as {name}:1")
    if not any(find_spec(plugin) for plugin in PLUGINS):
        raise ConfigError("JAX's CUDA plugin is not installed: pip install 'baichuan_omni_jax[cuda]'")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=_TARGETS[name], topology=f"1x1x{count}")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {topology}: the CUDA plugin cannot describe it: {error}") from error
    return list(found.devices)
