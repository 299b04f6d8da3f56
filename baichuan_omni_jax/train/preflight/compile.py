"""The training step of a run, compiled for devices that are not there."""

import math
import re
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.terms import chip_of
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.preflight.gpu import USABLE_SHARE, gpus_of, is_gpu
from baichuan_omni_jax.train.preflight.hlo import Temporary, largest_temporaries
from baichuan_omni_jax.train.preflight.program_cache import keep_program, load_program, program_key
from baichuan_omni_jax.train.state import StepSpec, TrainState, abstract_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compile_step

# A v4 chip's two cores are one JAX device, as on a v4 slice itself.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "... (480.00G) exceeds available HBM (95.73G)" and, of older compilers, "Used 480.00G of 95.73G hbm".
_REFUSALS = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip. `peak` is what the program holds at once: all of it, less outputs that reuse arguments.

    Where the compiler refused the program, `available` is what it would allow, and only its total is known: `temp` is
    what the total leaves beside the arguments, and `code` is 0.
    """

    args: int
    outputs: int
    temp: int
    code: int
    available: int | None = None

    @property
    def peak(self) -> int:
        return self.args + self.outputs + self.temp + self.code


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled step, its HLO text "" where it was refused, and the seconds that tracing and compiling took."""

    memory: Memory
    hlo: str
    largest: list[Temporary]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Turns all but the seconds into plain dicts and lists."""
        return {"memory": vars(self.memory), "hlo": self.hlo, "largest": [vars(one) for one in self.largest]}

    @classmethod
    def from_json(cls, kept: dict[str, Any], seconds: float) -> "CompiledProgram":
        """Reads what `to_json` made."""
        return cls(Memory(**kept["memory"]), kept["hlo"], [Temporary(**one) for one in kept["largest"]], seconds)


def abstract_step(
    run: RunConfig, omni: OmniConfig, devices: list[Any]
) -> tuple[StepSpec, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Describes the run's step on these devices: its spec, and state and batch as shapes with shardings.

    Raises ConfigError where mesh, budgets, groups and model do not fit.
    """
    mesh, compute = make_mesh(run.mesh, devices), make_compute(run)
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        spec.task.check(mesh)
        return spec, abstract_state(spec), spec.task.abstract_batch(mesh)


def bytes_on_a_chip(tree: object) -> int:
    """Counts the bytes of one device's parts of arrays that are described by shape and sharding."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def compile_for_devices(
    spec: StepSpec, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct], *, read: bool = True
) -> CompiledProgram:
    """Compiles the step. A program that the compiler refuses for want of memory is a result, not an error.

    Without `read` it is compiled as a run compiles it, which then finds it in JAX's compilation cache; its HLO is "".
    """
    start = time.monotonic()
    with jax.set_mesh(spec.mesh), tempfile.TemporaryDirectory(prefix="preflight") as folder:
        # Traced for the topology's devices, from shapes alone.
        step = compile_step(spec)
        lowered = step.lower(state, batch)
        key = program_key(lowered.as_text(), spec.mesh.devices.ravel().tolist(), step.options)
        if read and (kept := load_program(key)) is not None:
            return CompiledProgram.from_json(kept, time.monotonic() - start)
        # Asynchronous TPU programs cannot all be printed (jax 0.10), but XLA dumps them.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": "jit_step"}
        try:
            memory = _memory(lowered.compile(compiler_options=dump if read else None).memory_analysis())
        # Too large is a result: the message says by how much.
        except jax.errors.JaxRuntimeError as error:
            memory = refused(str(error), bytes_on_a_chip((state, batch)))
            if memory is None:
                raise
        hlo = _dumped(folder, "*after_optimizations.txt")
        largest = largest_temporaries(_dumped(folder, "*after_optimizations-buffer-assignment.txt"), hlo)
    built = CompiledProgram(memory, hlo if memory.available is None else "", largest, time.monotonic() - start)
    # Kept programs are read: one without its text would be taken for all there is.
    if read:
        keep_program(key, built.to_json())
    return built


def usable_bytes(device: Any) -> int | None:
    """Returns the bytes that a program may use of a device, there or not; None where nobody says (a CPU)."""
    # A device that is there says itself what JAX took; of another what the chip has, and of a GPU what JAX would take.
    stats = device.memory_stats() if device in jax.devices() else None
    if stats:
        return stats["bytes_limit"]
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    return int(chip.hbm_bytes * USABLE_SHARE) if device.platform == "gpu" else chip.hbm_bytes


def _memory(stats: Any) -> Memory:
    # Donated outputs lie where their inputs were.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, new, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes)


def refused(message: str, arguments: int) -> Memory | None:
    """Reads what an out-of-memory message of the TPU compiler says; returns None for another message."""
    for pattern in _REFUSALS:
        if match := pattern.search(message):
            needed, allowed = (int(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
            return Memory(arguments, 0, max(needed - arguments, 0), 0, allowed)
    return None


def _dumped(folder: str, pattern: str) -> str:
    found = sorted(Path(folder).glob(pattern))
    return found[0].read_text(encoding="utf-8") if found else ""


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """Lists the devices of `slices` slices of a topology such as `v5p:4x4x4`, or of a host's GPUs such as `h100:1`.

    Raises ConfigError when libtpu or JAX's CUDA plugin is missing or does not know the topology.
    """
    if slices < 1:
        raise ConfigError(f"mesh.slices must be at least 1, not {slices}")
    if is_gpu(topology):
        if slices > 1:
            raise ConfigError(f"mesh.slices is {slices}: only TPU slices are joined, not {topology}")
        return gpus_of(topology)
    # libtpu describes the devices; it needs no TPU for that.
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
            f"--topology {topology} is not one that libtpu knows (such as v5p:4x4x4, v5e:4x8, v6e:4x8), nor GPUs "
            f"(h100:1): {why}"
        ) from error
