"""A branch's parameters on disk, slice by slice: what Orbax writes and reads as a whole, through TensorStore.

    BRANCH/_METADATA      the tree: one entry a parameter
    BRANCH/manifest...    one zarr array a parameter, all in one OCDBT database

A stacked parameter is cut at least between layers, so that one layer is written, and read, alone.
"""

from math import prod
from pathlib import Path

import numpy as np
import tensorstore as ts
from etils import epath

from baichuan_omni_jax.checkpoint.arrays import METADATA, array_spec, metadata_text, open_arrays, read_result
from baichuan_omni_jax.convert.safetensors_io import BLOCK_BYTES, TensorInfo

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
        (self._folder / METADATA).write_text(metadata_text(self._arrays))

    def _create(self, name: str, info: TensorInfo, depth: int) -> ts.TensorStore:
        inner = info.shape[depth:]
        if inner:
            # Blocks of rows, as they come from safetensors: each is written once, whole chunks at a time.
            rows = BLOCK_BYTES // max(1, prod(inner[1:]) * info.dtype.itemsize)
            inner = (min(max(rows, 1), inner[0]), *inner[1:])
        # A chunk never spans layers, so that one is written and read alone.
        spec = array_spec(self._folder, name, info.shape, (*[1] * depth, *inner))
        return ts.open(spec, create=True, dtype=info.dtype, shape=info.shape, context=self._context).result()


class BranchReader:
    """Reads the parameters of a branch, as `BranchWriter` or Orbax wrote them. Raises ConfigError."""

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)
        self._arrays = open_arrays(self._folder, f"branch {folder}", cache=False)
        self.infos = {name: TensorInfo(tuple(x.shape), x.dtype.numpy_dtype) for name, x in self._arrays.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values at `index` of a parameter. Raises ConfigError where they are damaged."""
        return read_result(self._arrays[name][index].read(), self._folder, f"branch {self._folder}", name)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
