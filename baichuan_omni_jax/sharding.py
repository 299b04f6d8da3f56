"""The mesh, and the one table that says which mesh axes each logical axis is split over.

Every mesh has the four axes `data, fsdp, context, tensor`, all explicit: arrays carry their sharding in their type, on
one CPU (1x1x1x1) as on a pod. Parameters are stored split over `fsdp` and `context` along their `embed` axis and
gathered where they are used; activations are split over (data, fsdp) by row and over `context` by position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

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


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Field = logical axis, value = the mesh axes it is split over (None: whole on every device).

    `embed` to `codes` are axes of parameters; `batch` to `act_vocab` are axes of activations.

    >>> ShardingRules().spec("batch", "length", "act_embed")
    PartitionSpec(('data', 'fsdp'), 'context', None)
    """

    embed: MeshAxes = ("fsdp", "context")
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    codes: MeshAxes = None
    depth: MeshAxes = None
    kernel: MeshAxes = None
    layers: MeshAxes = None
    norm: MeshAxes = None
    small: MeshAxes = None

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = "context"
    media: MeshAxes = ("context", "tensor")
    act_embed: MeshAxes = None
    act_heads: MeshAxes = "tensor"
    act_kv_heads: MeshAxes = "tensor"
    act_mlp: MeshAxes = "tensor"
    act_vocab: MeshAxes = "tensor"

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes of the logical axis `name`. Raises KeyError on an unknown name."""
        if name not in self.__dataclass_fields__:
            raise KeyError(f"unknown logical axis {name!r}; known: {', '.join(f.name for f in fields(self))}")
        value = getattr(self, name)
        return () if value is None else (value,) if isinstance(value, str) else value

    def spec(self, *names: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dims have these logical names (None: whole).

        Raises KeyError on an unknown name, ValueError when two dims ask for the same mesh axis.
        """
        split = [self.axes(name) if name else () for name in names]
        used = [axis for axes in split for axis in axes]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {names} use a mesh axis twice: {split}")
        return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in split))

    def gathered_spec(self, *names: str | None) -> PartitionSpec:
        """`spec` of a parameter while it is computed with: whole over `data, fsdp, context`, split over `tensor`."""
        kept = [tuple(a for a in self.axes(name) if a not in GATHERED_AXES) if name else () for name in names]
        return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in kept))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The four-axis explicit mesh over `devices` (default: all). One axis may be -1 and takes what is left.

    On TPU, neighbours along an axis are neighbours on the chip's links where the sizes allow it; over several slices
    `data` alone crosses the data-centre network. Elsewhere devices go by their order.
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


def _across_slices(slices: int, sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    data, *rest = sizes
    if data % slices:
        raise ConfigError(f"mesh.data {data} is not a multiple of mesh.slices {slices}: only data crosses slices")
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found != slices:
        raise ConfigError(f"mesh.slices is {slices}, but the devices form {found}: set it to what the job was given")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def _within_slice(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform == "tpu":
        try:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        except NotImplementedError:  # sizes that the slice's shape cannot follow: correct in any order
            pass
    return np.array(devices).reshape(sizes)


def axis_product(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Devices along `axes`."""
    return math.prod(mesh.shape[axis] for axis in axes)


def placement(spec: PartitionSpec) -> PartitionSpec | None:
    """Returns `spec` where a mesh is set, else None: what `out_sharding=` wants on one device without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def place(x: Array, spec: PartitionSpec) -> Array:
    """Returns `x` split over devices as `spec` says; as it is where no mesh is set. Free where it already is so."""
    return x if jax.sharding.get_abstract_mesh().empty else reshard(x, spec)


def check_divisible(
    mesh: Mesh | AbstractMesh, rules: ShardingRules, shape: Sequence[int], names: Sequence[str], what: str
) -> None:
    """Raises ConfigError naming `what`, the dimension and the mesh axes where a split is uneven."""
    for size, name in zip(shape, names, strict=True):
        axes = rules.axes(name)
        parts = axis_product(mesh, axes)
        if size % parts:
            raise ConfigError(
                f"{what}: dimension {name} of {size} is not divisible by {parts}, the mesh axes {' x '.join(axes)}"
            )


def parameter_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """Logical axes of a parameter as it is now: inside a layer scan its own, stacked with `layers` in front."""
    axes = variable.axes
    return ("layers",) * (variable.ndim - len(axes)) + axes


def parameter_sharding(mesh: Mesh, rules: ShardingRules, variable: nnx.Variable, name: str) -> NamedSharding:
    """Where a parameter is stored. Raises ConfigError, with its `name`, when the mesh does not divide it."""
    axes = parameter_axes(variable)
    check_divisible(mesh, rules, variable.shape, axes, name)
    return NamedSharding(mesh, rules.spec(*axes))
