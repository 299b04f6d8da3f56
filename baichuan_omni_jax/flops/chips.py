"""What an accelerator can do at most: matrix FLOP/s in bfloat16 and bytes of memory, by JAX's `device_kind`.

Figures of one JAX device, dense, without sparsity; of a TPU7x chip that is one of its two chiplets. FLOP/s and GPU
memory are the makers' (cloud.google.com/tpu/docs; NVIDIA's data sheets of A100, H100 and H200). TPU memory is what a
program may use of it, as libtpu 0.0.52 says when it refuses one, to 0.01 GiB.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """`name` as in a topology, `flops` bfloat16 FLOP/s, `hbm_bytes` of memory; all of one JAX device."""

    name: str
    flops: float
    hbm_bytes: int


TPUS = {
    "TPU v4": Chip("v4", 275e12, int(30.75 * GIB)),
    "TPU v5 lite": Chip("v5e", 197e12, int(15.75 * GIB)),
    "TPU v5": Chip("v5p", 459e12, int(95.73 * GIB)),
    "TPU v6 lite": Chip("v6e", 918e12, int(31.24 * GIB)),
    "TPU7x": Chip("tpu7x", 2307e12 / 2, int(94.74 * GIB)),
}
# Their kinds carry form factor and memory behind the name: the longest name that a kind starts with counts.
GPUS = {
    "NVIDIA A100": Chip("A100", 312e12, 80 * GIB),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40 * GIB),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40GB", 312e12, 40 * GIB),
    "NVIDIA H100": Chip("H100", 989e12, 80 * GIB),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GIB),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * GIB),
    "NVIDIA H200": Chip("H200", 989e12, 141 * 10**9),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141 * 10**9),
}


def chip_of(device_kind: str) -> Chip | None:
    """Finds the chip that `jax.Device.device_kind` names; None for one that is not listed (a CPU).

    >>> chip_of("NVIDIA H100 80GB HBM3").name
    'H100'
    """
    # TPU kinds are exact.
    if device_kind in TPUS:
        return TPUS[device_kind]
    names = [name for name in GPUS if device_kind.startswith(name)]
    return GPUS[max(names, key=len)] if names else None


def peak_flops(device_kind: str) -> float | None:
    """Returns bfloat16 FLOP/s of one device; None for a kind that is not listed (a CPU)."""
    chip = chip_of(device_kind)
    return chip.flops if chip else None
