"""One folder of arrays and text files, written by Orbax as a whole or not at all.

Orbax calls `async_save` (arrays are copied off the devices before it returns), writes in a background thread, calls
`finalize` on the first host when every host has written, and then renames the temporary folder to its final name.
Text files and checksums are written in `finalize`: the rename commits them together with the arrays.
"""

from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from baichuan_omni_jax.checkpoint.checksums import write_checksums

# A chunk is what is read at once: small enough that a large stacked tensor is never whole in one host's memory.
_CHUNK_BYTES = 64 << 20
# Orbax's name for a folder that is not committed is the final name and this.
TEMPORARY = ".orbax-checkpoint-tmp"


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
        raise NotImplementedError("a folder is read tree by tree: trees.read_tree")

    def finalize(self, directory: epath.Path) -> None:
        assert self._pending is not None
        for name in self._pending.trees:
            self._arrays.finalize(directory / name)
        for name, text in self._pending.texts.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)
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


def make_checkpointer() -> ocp.AsyncCheckpointer:
    """The checkpointer of `FolderSave`s."""
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(FolderHandler(), async_options=options)
