"""A branch's parameters on disk, slice by slice: what Orbax writes and reads as a whole, through TensorStore.

    BRANCH/_METADATA      the tree: one entry a parameter
    BRANCH/manifest...    one zarr array a parameter, all in one OCDBT database

A stacked parameter is cut at least between layers, so that one layer is written, and read, alone.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from baichuan_omni_jax.convert.safetensors_io import BLOCK_BYTES, TensorInfo
from baichuan_omni_jax.errors import ConfigError

_METADATA = "_METADATA"
# Nothing is cached: every slice is touched once. A conversion that is cut off leaves nothing, so nothing is synced.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False, "data_copy_concurrency": {"limit": 2}}
Index = tuple[int | slice, ...]


class BranchWriter:
    """Writes the parameters `leaves` into `folder`; the first `depth[name]` axes of each are layers."""

    def __init__(self, folder: Path, leaves: dict[str, TensorInfo], depth: dict[str, int]):
        folder.mkdir(parents=True)
        self._folder, self._context = folder, ts.Context(_CONTEXT)
        self._arrays = {name: self._create(name, info, depth[name]) for name, info in leaves.items()}

    def write(self, name: str, index: Index, value: np.ndarray) -> None:
        """Writes `value` at `index` of a parameter, and returns when it is written. Raises OSError (a full disk)."""
        try:
            self._arrays[name][index].write(value).result()
        except ValueError as error:  # tensorstore's, whatever the operating system said
            raise OSError(f"parameter {name}: {_first_line(error)}") from error

    def close(self) -> None:
        """Writes the tree that Orbax looks for."""
        entries = {
            str(tuple(name.split("."))): {
                "key_metadata": [{"key": part, "key_type": 2} for part in name.split(".")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in self._arrays
        }
        # What Orbax writes for nested dicts of numpy arrays in an OCDBT database.
        tree = {"tree_metadata": entries, "use_ocdbt": True, "use_zarr3": False}
        (self._folder / _METADATA).write_text(json.dumps(tree))

    def _create(self, name: str, info: TensorInfo, depth: int) -> ts.TensorStore:
        inner = info.shape[depth:]
        if inner:
            # Blocks of rows, as they come from safetensors: each is written once, whole chunks at a time.
            rows = BLOCK_BYTES // max(1, prod(inner[1:]) * info.dtype.itemsize)
            inner = (min(max(rows, 1), inner[0]), *inner[1:])
        # A chunk never spans layers, so that one is written and read alone. Weights hardly compress.
        metadata = {"chunks": [1] * depth + list(inner), "compressor": None}
        spec = {"driver": "zarr", "kvstore": _store(self._folder, name), "metadata": metadata}
        return ts.open(spec, create=True, dtype=info.dtype, shape=info.shape, context=self._context).result()


class BranchReader:
    """Reads the parameters of a branch, as `BranchWriter` or Orbax wrote them. Raises ConfigError."""

    def __init__(self, folder: Path):
        self._folder, context = folder, ts.Context(_CONTEXT)
        try:
            tree = json.loads((folder / _METADATA).read_text())
            driver = "zarr3" if tree.get("use_zarr3") else "zarr"
            names = [
                ".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree["tree_metadata"].values()
            ]
            # All are opened at once: on a network file system each takes a moment.
            futures = {
                name: ts.open({"driver": driver, "kvstore": _store(folder, name)}, open=True, context=context)
                for name in names
            }
            self._arrays = {name: future.result() for name, future in futures.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder} cannot be read as a branch: {_first_line(error)}") from error
        self.infos = {name: TensorInfo(tuple(x.shape), x.dtype.numpy_dtype) for name, x in self._arrays.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values at `index` of a parameter. Raises ConfigError where they are damaged."""
        try:
            return self._arrays[name][index].read().result()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._folder}: parameter {name} cannot be read: {_first_line(error)}") from error


def _store(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}, "path": f"{name}/"}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
