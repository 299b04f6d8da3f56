"""The mesh, and the one table that says which mesh axes each logical axis is split over.

Every mesh has the four axes `data, fsdp, context, tensor`, all explicit: arrays carry their sharding in their type, on
one CPU (1x1x1x1) as on a pod. Parameters are stored split over `fsdp` and `context` along their `embed` axis and
gathered where they are used; activations are split over (data, fsdp) by row and over `context` by position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "context", "tensor")
# Mesh axes along which a parameter is stored in parts but computed with whole.
GATHERED_AXES = frozenset({"data", "fsdp", "context"})

MeshAxes = str | tuple[str, ...] | None
# Of `jax.Device`, which type checkers do not take for a class.
Devices = Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Field = logical axis, value = the mesh axes it is split over (None: whole on every device).

    >>> ShardingRules().spec("batch", "length", "act_embed") == PartitionSpec(("data", "fsdp"), "context", None)
    True
    """

    # Axes of parameters.
    embed: MeshAxes = ("fsdp", "context")  # model width: every large parameter has it, so it is what FSDP splits
    heads: MeshAxes = "tensor"  # query heads
    kv_heads: MeshAxes = "tensor"  # key and value heads
    head_dim: MeshAxes = None  # width of a head
    mlp: MeshAxes = "tensor"  # inner width of MLPs
    vocab: MeshAxes = "tensor"  # tokens, or codes of a level's head
    codes: MeshAxes = None  # codes of a codebook: whole, as the search for the nearest sees all of them
    depth: MeshAxes = None  # levels of the audio head
    kernel: MeshAxes = None  # positions of a convolution
    layers: MeshAxes = None  # stacked layers: `jax.lax.scan` goes over them
    norm: MeshAxes = None  # scales and biases
    small: MeshAxes = None  # any other axis that is not worth splitting

    # Axes of activations.
    batch: MeshAxes = ("data", "fsdp")  # rows
    length: MeshAxes = "context"  # tokens of a row
    media: MeshAxes = ("context", "tensor")  # patches, code frames, mel windows of a row
    act_embed: MeshAxes = None  # model width
    act_heads: MeshAxes = "tensor"  # query heads
    act_kv_heads: MeshAxes = "tensor"  # key and value heads
    act_mlp: MeshAxes = "tensor"  # inner width of MLPs
    act_vocab: MeshAxes = "tensor"  # logits

    @classmethod
    def unsplit(cls) -> "ShardingRules":
        """Makes rules that split nothing: of one device, and of what runs inside a `shard_map`."""
        return cls(**dict.fromkeys((field.name for field in fields(cls)), None))

    def axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes of the logical axis `name`. Raises KeyError on an unknown name."""
        if name not in self.__dataclass_fields__:
            raise KeyError(f"unknown logical axis {name!r}; known: {', '.join(f.name for f in fields(self))}")
        value = getattr(self, name)
        return () if value is None else (value,) if isinstance(value, str) else value

    def spec(self, *names: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array whose dims have these logical names (None: whole).

        Raises KeyError on an unknown name, ValueError when two dims would be split over the same mesh axis.
        """
        split = [self.axes(name) if name else () for name in names]
        used = [axis for axes in split for axis in axes]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {names} use a mesh axis twice: {split}")
        return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in split))

    def gathered_spec(self, *names: str | None) -> PartitionSpec:
        """Returns the spec of a parameter in use: whole over `data, fsdp, context`, split over `tensor` alone."""
        kept = [tuple(a for a in self.axes(name) if a not in GATHERED_AXES) if name else () for name in names]
        return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in kept))


def make_mesh(config: MeshConfig, devices: Devices | None = None) -> Mesh:
    """Makes the four-axis explicit mesh over `devices` (default: all). One axis may be -1 and takes what is left.

    On TPU, neighbors along an axis are neighbors on the chip's links where the sizes allow it; over several slices
    `data` alone crosses the data-center network. Elsewhere devices go by their order.
    Raises ConfigError when the product is not the number of devices, or `slices` are not what the devices form.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    named = "x".join(str(size) for size in sizes)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh {named}: sizes must be positive, and at most one -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"mesh {named} (data x fsdp x context x tensor) does not cover the {len(devices)} devices")
    arranged = _across_slices(config.slices, sizes, devices) if config.slices > 1 else _within_slice(sizes, devices)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def _across_slices(slices: int, sizes: Sequence[int], devices: Devices) -> np.ndarray:
    data, *rest = sizes
    if data % slices:
        raise ConfigError(f"mesh.data {data} is not a multiple of mesh.slices {slices}: only data crosses slices")
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found != slices:
        raise ConfigError(f"mesh.slices is {slices}, but the devices form {found}: set it to what the job was given")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def _within_slice(sizes: Sequence[int], devices: Devices) -> np.ndarray:
    if devices[0].platform == "tpu":
        try:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        # Sizes that the slice's shape cannot follow: correct in any order, but not as fast.
        except NotImplementedError:
            pass
    return np.array(devices).reshape(sizes)


def axis_product(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Returns the number of devices along `axes`."""
    return math.prod(mesh.shape[axis] for axis in axes)


def placement(spec: PartitionSpec) -> PartitionSpec | None:
    """Returns `spec` where a mesh is set, else None: what `out_sharding=` wants on one device without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def place(x: Array, spec: PartitionSpec) -> Array:
    """Returns `x` split over devices as `spec` says; as it is where no mesh is set. Free where it already is so."""
    return x if jax.sharding.get_abstract_mesh().empty else reshard(x, spec)


def check_divisible(
    mesh: Mesh | AbstractMesh, rules: ShardingRules, shape: Sequence[int], names: Sequence[str | None], what: str
) -> None:
    """Checks that a mesh splits an array evenly.

    Args:
        mesh: the mesh.
        rules: the logical axes' mesh axes.
        shape: sizes of the array's dimensions.
        names: their logical axes.
        what: what the array is called in the error.

    Raises:
        ConfigError: names `what`, the dimension and the mesh axes where a split is uneven.
    """
    for size, name in zip(shape, names, strict=True):
        axes = rules.axes(name) if name else ()
        parts = axis_product(mesh, axes)
        if size % parts:
            raise ConfigError(
                f"{what}: dimension {name} of {size} is not divisible by {parts}, the mesh axes {' x '.join(axes)}"
            )


def parameter_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """Returns the logical axes of a parameter: inside a layer scan its own, stacked with `layers` in front."""
    axes = variable.axes
    return ("layers",) * (variable.ndim - len(axes)) + axes


def parameter_sharding(mesh: Mesh, rules: ShardingRules, variable: nnx.Variable, name: str) -> NamedSharding:
    """Returns where a parameter is stored. Raises ConfigError, with its `name`, when the mesh does not divide it."""
    axes = parameter_axes(variable)
    check_divisible(mesh, rules, variable.shape, axes, name)
    return NamedSharding(mesh, rules.spec(*axes))
