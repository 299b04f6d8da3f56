"""Trees of arrays as files, written as a whole or not at all, and read back.

Any pytree is stored as nested dicts keyed by the parts of each leaf's dotted name, so no file depends on a Python
class: a module, an optimizer state of named tuples and a checkpoint that was written tensor by tensor look alike, and
the tree that is read into gives the classes back.

Orbax sees to it that there is a whole folder or none: it calls `async_save` (arrays are copied off the devices before
it returns; each host then writes its own in a background thread), calls `finalize` on the first host when every host
has written, and then renames the temporary folder to its final name. Text files and checksums are written in
`finalize`: the rename commits them together with the arrays. In a bucket, and on a file system that renames no folders,
the checksums commit: they are the last file, and without them nothing counts.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from baichuan_omni_jax.checkpoint.arrays import (
    METADATA,
    HostPart,
    copy_parts,
    host_folder,
    merge_hosts,
    metadata_text,
    open_arrays,
    read_arrays,
    write_parts,
)
from baichuan_omni_jax.checkpoint.checksums import write_checksums
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


def stored_names(tree: Tree) -> dict[str, Any]:
    """Returns what of a pytree is written, by dotted name. Arrays of the host are copied, as they may change."""
    named = leaves_by_name(tree)
    return {name: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in named.items()}


def read_tree(folder: epath.PathLike, abstract: Tree, what: str) -> Tree:
    """Reads a tree of arrays into the structure, dtypes and shardings of `abstract`. Each host reads its own parts.

    Args:
        folder: the tree's folder, as written here, by an older version or by Orbax.
        abstract: leaves are `jax.ShapeDtypeStruct` or arrays; without a sharding one goes to the default device.
        what: what the tree is called in errors: "branch llm".

    Returns:
        The tree.

    Raises:
        ConfigError: a tensor is missing, superfluous or of another shape, or there is nothing to read.
        DamagedError: bytes are missing or changed; names tensor and file.
        OSError: storage refuses to be read.
    """
    folder, wanted = epath.Path(folder), leaves_by_name(abstract)
    if not wanted:
        return abstract
    what = f"{what} of {folder}"
    # Names and shapes first, so that an error names the tensor and both shapes.
    stores = open_arrays(folder, what)
    _check_shapes({name: tuple(store.shape) for name, store in stores.items()}, wanted, what)
    return fill(abstract, read_arrays(folder, wanted, stores, what))


def _check_shapes(stored: dict[str, tuple[int, ...]], wanted: dict[str, Any], what: str) -> None:
    for name, leaf in wanted.items():
        if name not in stored:
            raise ConfigError(f"{what} lacks tensor {name} of shape {tuple(leaf.shape)}, which the model has")
        if stored[name] != tuple(leaf.shape):
            raise ConfigError(f"{what}: tensor {name} has shape {stored[name]}, the model wants {tuple(leaf.shape)}")
    for name in stored:
        if name not in wanted:
            raise ConfigError(f"{what} holds tensor {name} of shape {stored[name]}, which the model does not have")


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


class FolderHandler(ocp.AsyncCheckpointHandler):
    """Writes a `FolderSave`. One save at a time, which `ocp.AsyncCheckpointer` sees to."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "checkpoint-arrays")
        self._pending: FolderSave | None = None

    async def async_save(self, directory: epath.Path, args: "FolderSave") -> list[Any]:
        # Copied before this returns: from then on the buffers belong to the next step.
        parts = {name: copy_parts(named) for name, named in args.trees.items()}
        self._pending = args
        return [self._writer.submit(_write_trees, directory, parts)]

    def save(self, directory: epath.Path, args: "FolderSave") -> None:
        raise NotImplementedError("FolderHandler is for ocp.AsyncCheckpointer")

    def restore(self, directory: epath.Path, args: "_FolderRestore") -> Any:
        raise NotImplementedError("a folder is read tree by tree: read_tree")

    def finalize(self, directory: epath.Path) -> None:
        assert self._pending is not None
        texts = dict(self._pending.texts)
        for name, named in self._pending.trees.items():
            merge_hosts(directory / name)
            texts[f"{name}/{METADATA}"] = metadata_text(named)
        contents = {name: text.encode() for name, text in texts.items()}
        for name, data in contents.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with_retries(lambda target=target, data=data: target.write_bytes(data), f"writing {target}")
        write_checksums(directory, contents)
        self._pending = None

    def close(self) -> None:
        self._writer.shutdown()


def _write_trees(directory: epath.Path, trees: Mapping[str, Mapping[str, HostPart]]) -> None:
    for name, parts in trees.items():
        write_parts(host_folder(directory / name, jax.process_index()), parts)


@ocp.args.register_with_handler(FolderHandler, for_save=True)
@dataclass
class FolderSave(ocp.args.CheckpointArgs):
    """`trees`: folder name -> arrays by dotted name, at least one each; `texts`: file name -> contents."""

    trees: dict[str, dict[str, Any]]
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
