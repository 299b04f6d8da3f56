"""Trees of arrays as files: any pytree is stored as nested dicts keyed by the parts of each leaf's dotted name.

So no file depends on a Python class: a module, an optimizer state of named tuples and a checkpoint that was written
tensor by tensor look alike, and the tree asked for gives the classes back.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import dotted
from baichuan_omni_jax.sharding import ShardingRules, parameter_sharding

Tree = Any


def with_shardings(
    module: Tree, mesh: Mesh | None, rules: ShardingRules, *, dtype: jnp.dtype | None = None, name: str = ""
) -> Tree:
    """An abstract module (`jax.eval_shape` of its constructor) whose parameters know where they will be stored.

    Without a mesh they go to the default device. `dtype` replaces the dtype of floating-point parameters; `name` stands
    before parameter names in errors.
    Raises ConfigError naming the parameter when the mesh does not divide it.
    """

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        where = f"{name}.{dotted(path)}" if name else dotted(path)
        floating = jnp.issubdtype(variable.dtype, jnp.floating)
        kind = dtype if dtype is not None and floating else variable.dtype
        sharding = parameter_sharding(mesh, rules, variable, where) if mesh else None
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, kind, sharding=sharding))

    return jax.tree_util.tree_map_with_path(place, module, is_leaf=_is_variable)


def leaves_by_name(tree: Tree) -> dict[str, Any]:
    """Every array of a pytree by dotted name (`0.mu.llm.embed`), out of its `nnx.Variable` if it is in one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    named = {dotted(path): _unwrap(leaf) for path, leaf in leaves}
    assert len(named) == len(leaves), f"{len(leaves) - len(named)} leaves share a dotted name with another"
    return named


def fill(tree: Tree, values: dict[str, Any]) -> Tree:
    """`tree` with the leaf of each dotted name replaced by `values[name]`."""

    def put(path: tuple, leaf: Any) -> Any:
        value = values[dotted(path)]
        return leaf.replace(value) if _is_variable(leaf) else value

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=_is_variable)


def nest(named: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": x, "a.c": y}` as `{"a": {"b": x, "c": y}}`."""
    nested: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = value
    return nested


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def to_stored(tree: Tree) -> dict[str, Any]:
    """What Orbax is given to write: nested dicts of arrays. Arrays of the host are copied, they may change."""
    named = leaves_by_name(tree)
    return nest({name: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in named.items()})


def read_tree(folder: epath.PathLike, abstract: Tree, what: str) -> Tree:
    """Reads an Orbax checkpoint into the structure, dtypes and shardings of `abstract`.

    `abstract` has `jax.ShapeDtypeStruct` (or array) leaves; without a sharding a leaf goes to the default device.
    `what` names the tree in errors: "branch llm". Raises ConfigError when a tensor is missing, superfluous or of
    another shape, or when there is nothing to read.
    """
    folder, wanted = epath.Path(folder), leaves_by_name(abstract)
    if not wanted:
        return abstract
    reader = ocp.PyTreeCheckpointHandler()
    _check_shapes(_stored_shapes(reader, folder, what), wanted, f"{what} of {folder}")
    # Each array is read straight into its dtype and sharding: no host holds more than its own parts.
    arguments = nest({name: _restore_args(leaf) for name, leaf in wanted.items()})
    try:
        found = flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} of {folder} cannot be read: {_first_line(error)}") from error
    placed = {name: value if isinstance(value, jax.Array) else jnp.asarray(value) for name, value in found.items()}
    return fill(abstract, placed)


def _stored_shapes(reader: ocp.PyTreeCheckpointHandler, folder: epath.Path, what: str) -> dict[str, tuple[int, ...]]:
    try:
        metadata = reader.metadata(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} of {folder} cannot be read: {_first_line(error)}") from error
    return {name: tuple(leaf.shape) for name, leaf in flatten(metadata.tree).items()}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_shapes(stored: dict[str, tuple[int, ...]], wanted: dict[str, Any], what: str) -> None:
    for name, leaf in wanted.items():
        if name not in stored:
            raise ConfigError(f"{what} lacks tensor {name} of shape {tuple(leaf.shape)}, which the model has")
        if stored[name] != tuple(leaf.shape):
            raise ConfigError(f"{what}: tensor {name} has shape {stored[name]}, the model wants {tuple(leaf.shape)}")
    for name in stored:
        if name not in wanted:
            raise ConfigError(f"{what} holds tensor {name} of shape {stored[name]}, which the model does not have")


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, dtype=leaf.dtype, sharding=sharding, global_shape=tuple(leaf.shape)
    )


def _unwrap(leaf: Any) -> Any:
    return leaf.get_value() if _is_variable(leaf) else leaf


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
