"""Trees of arrays as files, written by Orbax as a whole or not at all, and read back.

Any pytree is stored as nested dicts keyed by the parts of each leaf's dotted name, so no file depends on a Python
class: a module, an optimizer state of named tuples and a checkpoint that was written tensor by tensor look alike, and
the tree that is read into gives the classes back.

Orbax calls `async_save` (arrays are copied off the devices before it returns), writes in a background thread, calls
`finalize` on the first host when every host has written, and then renames the temporary folder to its final name.
Text files and checksums are written in `finalize`: the rename commits them together with the arrays. In a bucket, and
on a file system that renames no folders, the checksums commit: they are the last file, and without them nothing counts.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from baichuan_omni_jax.checkpoint.steps import write_checksums
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import dotted
from baichuan_omni_jax.sharding import ShardingRules, parameter_sharding
from baichuan_omni_jax.storage import with_retries

Tree = Any


def with_shardings(
    module: Tree, mesh: Mesh | None, rules: ShardingRules, *, dtype: jnp.dtype | None = None, name: str = ""
) -> Tree:
    """Places an abstract module: its parameters know where they will be stored.

    Args:
        module: shapes for values (`jax.eval_shape` of the constructor, or `abstract_branches`).
        mesh: the mesh that parameters are split over; None: they go to the default device.
        rules: the logical axes' mesh axes.
        dtype: replaces the dtype of floating-point parameters.
        name: stands before parameter names in errors.

    Returns:
        The same module, each parameter a `jax.ShapeDtypeStruct` with a sharding (None without a mesh).

    Raises:
        ConfigError: names the parameter that the mesh does not divide.
    """

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        where = f"{name}.{dotted(path)}" if name else dotted(path)
        floating = jnp.issubdtype(variable.dtype, jnp.floating)
        kind = dtype if dtype is not None and floating else variable.dtype
        sharding = parameter_sharding(mesh, rules, variable, where) if mesh else None
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, kind, sharding=sharding))

    return jax.tree_util.tree_map_with_path(place, module, is_leaf=_is_variable)


def leaves_by_name(tree: Tree) -> dict[str, Any]:
    """Returns every array of a pytree by dotted name (`0.mu.llm.embed`), out of its `nnx.Variable` if it is in one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    named = {dotted(path): leaf.get_value() if _is_variable(leaf) else leaf for path, leaf in leaves}
    assert len(named) == len(leaves), f"{len(leaves) - len(named)} leaves share a dotted name with another"
    return named


def fill(tree: Tree, values: dict[str, Any]) -> Tree:
    """Returns `tree` with the leaf of each dotted name replaced by `values[name]`."""

    def put(path: tuple, leaf: Any) -> Any:
        value = values[dotted(path)]
        return leaf.replace(value) if _is_variable(leaf) else value

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=_is_variable)


def nest(named: dict[str, Any]) -> dict[str, Any]:
    """Nests `{"a.b": x, "a.c": y}` to `{"a": {"b": x, "c": y}}`."""
    nested: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = value
    return nested


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undoes `nest`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def to_stored(tree: Tree) -> dict[str, Any]:
    """Returns what Orbax is given to write: nested dicts of arrays. Arrays of the host are copied, they may change."""
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
    # Names and shapes first, so that an error names the tensor and both shapes.
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


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


# A chunk is what is read at once: small enough that a large stacked tensor is never whole in one host's memory.
_CHUNK_BYTES = 64 << 20


class FolderHandler(ocp.AsyncCheckpointHandler):
    """Writes a `FolderSave`. One save at a time, which `ocp.AsyncCheckpointer` sees to."""

    def __init__(self) -> None:
        # Trained weights hardly compress, and trying costs most of the time of a save.
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._pending: FolderSave | None = None

    async def async_save(self, directory: epath.Path, args: "FolderSave") -> list[Any]:
        self._pending, futures = args, []
        for name, tree in args.trees.items():
            folder = directory / name
            folder.mkdir(parents=True, exist_ok=True)
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
            futures += await self._arrays.async_save(folder, args=ocp.args.PyTreeSave(tree, save_args)) or []
        return futures

    def save(self, directory: epath.Path, args: "FolderSave") -> None:
        raise NotImplementedError("FolderHandler is for ocp.AsyncCheckpointer")

    def restore(self, directory: epath.Path, args: "_FolderRestore") -> Any:
        raise NotImplementedError("a folder is read tree by tree: read_tree")

    def finalize(self, directory: epath.Path) -> None:
        assert self._pending is not None
        for name in self._pending.trees:
            self._arrays.finalize(directory / name)
        for name, text in self._pending.texts.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with_retries(lambda target=target, text=text: target.write_text(text), f"writing {target}")
        write_checksums(directory)
        self._pending = None

    def close(self) -> None:
        self._arrays.close()


@ocp.args.register_with_handler(FolderHandler, for_save=True)
@dataclass
class FolderSave(ocp.args.CheckpointArgs):
    """`trees`: folder name -> nested dict of arrays, at least one each; `texts`: file name -> contents."""

    trees: dict[str, Any]
    texts: dict[str, str]


@ocp.args.register_with_handler(FolderHandler, for_restore=True)
@dataclass
class _FolderRestore(ocp.args.CheckpointArgs):
    """Never used. Orbax takes a handler's save arguments as they are only if it has restore arguments too."""


def make_checkpointer(renames: bool) -> ocp.AsyncCheckpointer:
    """Makes the checkpointer of `FolderSave`s.

    `renames`: what it writes appears by one rename (`storage.renames_folders`); else a folder has its final name from
    the first file on, and counts once its checksums, the last file, are there.
    """
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    modes = ocp.path.atomicity
    commit = modes.AtomicRenameTemporaryPath if renames else modes.CommitFileTemporaryPath
    return ocp.AsyncCheckpointer(FolderHandler(), async_options=options, temporary_path_class=commit)
