"""The arrays of a checkpoint through TensorStore: each host writes its own parts, and reads what it needs.

    TREE/_METADATA                  the names of the tensors, as Orbax writes them
    TREE/ocdbt.process_N/           what host N wrote: an OCDBT database of zarr arrays
    TREE/manifest.ocdbt, TREE/d/    the database of all hosts: it points into their files, and repeats none of them

Every chunk ends in the crc32c of its bytes, which TensorStore computes while it writes and checks whenever it reads:
nobody reads a file only to find out whether it is whole. Nodes and manifests of the databases have checksums of their
own. What older versions wrote (zarr 2, without checksums in the arrays) is read as well.
"""

import json
import math
import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import is_url, with_retries

METADATA = "_METADATA"
_HOST = "ocdbt.process_"
# A chunk is what is read and checked at once: small enough that a large tensor is never whole in a host's memory twice.
CHUNK_BYTES = 64 << 20
# Bytes of a host that are being read at once; decoded chunks that several devices take parts of are kept meanwhile.
_IN_FLIGHT = 2 << 30
_CACHE = {"cache_pool": {"total_bytes_limit": 512 << 20}}
_NO_CACHE = {"cache_pool": {"total_bytes_limit": 0}}
# Shorter values lie in the nodes of the index, which have checksums: so do the descriptions of the arrays.
_DATABASE = {"max_inline_value_bytes": 1024}
# Objects of buckets are sent one stream each: files of this size are sent several at a time.
_FILE_BYTES = 256 << 20
# What TensorStore says where storage did not answer or does not let us: nothing is known of the bytes.
_REFUSED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "UNAUTHENTICATED")
_REFUSED = (*_REFUSED, "PERMISSION_DENIED")

Index = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


class DamagedError(ConfigError):
    """Bytes of a checkpoint are not those that were written, or are missing; the message names tensor and file."""


@dataclass(frozen=True)
class HostPart:
    """What one host writes of a tensor: copies of its parts, in host memory."""

    shape: Shape  # of the whole tensor
    dtype: np.dtype
    chunk: Shape
    values: list[tuple[Index, np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for _, value in self.values)


def copy_parts(named: Mapping[str, Any], *, replicas: bool = False) -> dict[str, HostPart]:
    """Copies what this host is to write of each tensor, so that its buffers may be donated.

    Args:
        named: name -> `jax.Array`, or numpy array, which all hosts have.
        replicas: whether to take every part that lies on this host; otherwise each part is taken by one host of all.

    Returns:
        Name -> what to write, of the tensors that this host has to write anything of.
    """
    arrays = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
    # All copies are under way before the first one is waited for.
    for leaf in arrays.values():
        for _, data in _shards(leaf, replicas):
            data.copy_to_host_async()
    parts = {}
    for name, leaf in named.items():
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        if name in arrays:
            # On CPU `asarray` is the buffer itself.
            values = [(index, np.array(data)) for index, data in _shards(leaf, replicas)]
            own = leaf.sharding.shard_shape(shape)
        else:
            values = [((slice(None),) * len(shape), leaf)] if replicas or jax.process_index() == 0 else []
            own = shape
        if values:
            parts[name] = HostPart(shape, dtype, chunk_shape(own, dtype.itemsize), values)
    return parts


def _shards(leaf: jax.Array, replicas: bool) -> list[tuple[Index, jax.Array]]:
    """Returns the parts of an array that lie on this host, each once, or those whose first copy does."""
    found = {}
    for shard in leaf.addressable_shards:
        if replicas or shard.replica_id == 0:
            found.setdefault(_bounds(shard.index, leaf.shape), (shard.index, shard.data))
    return list(found.values())


def _bounds(index: Index | None, shape: Sequence[int]) -> Bounds:
    """Returns an index (None: everything) in a form that can be compared and be a key."""
    if index is None:
        return tuple((0, size) for size in shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def chunk_shape(part: Shape, itemsize: int) -> Shape:
    """Cuts a host's part of a tensor into equal chunks of at most `CHUNK_BYTES`, along its first axes."""
    chunk = [max(size, 1) for size in part]
    for axis in range(len(chunk)):
        while math.prod(chunk) * itemsize > CHUNK_BYTES and chunk[axis] > 1:
            # Only divisors: chunks must not cross the parts of two hosts. A prime is cut to single rows.
            small = (n for n in range(2, math.isqrt(chunk[axis]) + 1) if chunk[axis] % n == 0)
            chunk[axis] //= next(small, chunk[axis])
    return tuple(chunk)


def array_spec(folder: epath.PathLike, name: str, shape: Shape, chunk: Shape) -> dict[str, Any]:
    """Describes a new tensor of the database `folder` to TensorStore: chunks with checksums, not compressed."""
    # Trained weights hardly compress, and trying costs most of the time of a save.
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
    metadata = {"shape": list(shape), "chunk_grid": grid, "codecs": codecs}
    store = database(folder, f"{name}/") | {"config": _DATABASE, "target_data_file_size": _FILE_BYTES}
    # Zeros are stored too: then a chunk that is not there is one that was lost.
    return {"driver": "zarr3", "kvstore": store, "metadata": metadata, "store_data_equal_to_fill_value": True}


def database(folder: epath.PathLike, path: str = "") -> dict[str, Any]:
    """Describes the OCDBT database in a folder, on a file system or in a bucket, to TensorStore."""
    return {"driver": "ocdbt", "base": _base(folder), "path": path}


def _base(folder: epath.PathLike) -> str | dict[str, Any]:
    return f"{folder}/" if is_url(folder) else {"driver": "file", "path": f"{epath.Path(folder).absolute()}/"}


def metadata_text(names: Collection[str]) -> str:
    """Returns what Orbax looks for in a tree's folder: nested dicts of arrays in an OCDBT database."""
    entries = {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": part, "key_type": 2} for part in name.split(".")],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    return json.dumps({"tree_metadata": entries, "use_ocdbt": True, "use_zarr3": True})


def host_folder(tree: epath.Path, host: int) -> epath.Path:
    """Returns where host number `host` writes its parts of a tree."""
    return tree / f"{_HOST}{host}"


def write_parts(folder: epath.Path, parts: Mapping[str, HostPart]) -> None:
    """Writes a host's parts into the database `folder`, all at once at its end. Raises OSError."""
    if not parts:
        return
    context, transaction = ts.Context(_NO_CACHE), ts.Transaction(atomic=True)
    try:
        stores = {
            name: ts.open(
                array_spec(folder, name, part.shape, part.chunk),
                create=True,
                dtype=ts.dtype(part.dtype),
                context=context,
                transaction=transaction,
            )
            for name, part in parts.items()
        }
        writes = [
            stores[name].result()[index].write(value, can_reference_source_data_indefinitely=True)
            for name, part in parts.items()
            for index, value in part.values
        ]
        for write in writes:
            write.result()
        transaction.commit_async().result()
    except (ValueError, NotImplementedError) as error:  # tensorstore's, whatever the operating system said
        raise OSError(f"{folder}: {_reason(error)}") from error


def merge_hosts(tree: epath.Path) -> None:
    """Makes one database of what all hosts wrote into `tree`: of their indexes, not of their bytes. Raises OSError."""
    context, transaction = ts.Context(_NO_CACHE), ts.Transaction(atomic=True)
    try:
        opening = ts.KvStore.open(database(tree) | {"config": _DATABASE}, context=context)
        whole = opening.result().with_transaction(transaction)
        for folder in sorted(path for path in tree.iterdir() if path.name.startswith(_HOST)):
            ts.KvStore.open(database(folder), context=context).result().experimental_copy_range_to(whole).result()
        transaction.commit_async().result()
    except (ValueError, NotImplementedError) as error:
        raise OSError(f"{tree}: {_reason(error)}") from error


def open_arrays(folder: epath.Path, what: str, *, cache: bool = True) -> dict[str, ts.TensorStore]:
    """Opens the tensors of a tree that was written here, by an older version or by Orbax: name -> tensor.

    Raises ConfigError, which begins with `what` ("branch llm of runs/x"), and OSError where storage refuses.
    """
    try:
        tree = json.loads(with_retries((folder / METADATA).read_text, f"reading {folder / METADATA}"))
        names = [".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree["tree_metadata"].values()]
        checked = bool(tree.get("use_zarr3"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if is_url(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise ConfigError(f"{what} cannot be read: {_reason(error)}") from error
    context = ts.Context(_CACHE if cache else _NO_CACHE)
    # All at once: in a bucket each takes a moment.
    opening = {
        name: ts.open(
            {
                "driver": "zarr3" if checked else "zarr",
                "kvstore": database(folder, f"{name}/"),
                "recheck_cached_data": False,
                "fill_missing_data_reads": not checked,
            },
            open=True,
            context=context,
        )
        for name in names
    }
    return {name: read_result(future, folder, what, name) for name, future in opening.items()}


def read_arrays(folder: epath.Path, wanted: Mapping[str, Any], stores: Mapping[str, ts.TensorStore], what: str) -> dict:
    """Reads tensors into their dtypes and shardings: of each, the parts of this host's devices, each part once.

    Args:
        folder: the tree's folder.
        wanted: name -> `jax.ShapeDtypeStruct` or array; without a sharding a tensor goes to the default device.
        stores: what `open_arrays` made of the folder.
        what: what the tree is called in errors.

    Returns:
        Name -> array.

    Raises:
        DamagedError: bytes are not those that were written.
        OSError: storage refuses to be read.
    """
    found: dict[str, jax.Array] = {}
    reading: deque[tuple[str, dict[Bounds, ts.Future]]] = deque()
    sizes: dict[str, int] = {}
    for name, leaf in wanted.items():
        shape, sharding = tuple(leaf.shape), getattr(leaf, "sharding", None)
        # Devices that hold the same part share what is read of it.
        indexes = [None] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
        parts = {_bounds(index, shape): index for index in indexes}
        store = stores[name]
        store = store if store.dtype == ts.dtype(leaf.dtype) else ts.cast(store, ts.dtype(leaf.dtype))
        reading.append((name, {bounds: store[index or ...].read() for bounds, index in parts.items()}))
        part = shape if sharding is None else sharding.shard_shape(shape)
        sizes[name] = len(parts) * math.prod(part) * np.dtype(leaf.dtype).itemsize
        # The oldest is waited for while the others are on their way.
        while len(reading) > 1 and sum(sizes[waiting] for waiting, _ in reading) > _IN_FLIGHT:
            _finish(reading.popleft(), found, wanted, folder, what)
    while reading:
        _finish(reading.popleft(), found, wanted, folder, what)
    return found


def _finish(
    read: tuple[str, dict[Bounds, ts.Future]],
    found: dict[str, jax.Array],
    wanted: Mapping[str, Any],
    folder: epath.Path,
    what: str,
) -> None:
    """Waits for the parts of one tensor and puts them on their devices."""
    name, parts = read
    values = {bounds: read_result(part, folder, what, name) for bounds, part in parts.items()}
    shape, sharding = tuple(wanted[name].shape), getattr(wanted[name], "sharding", None)
    if sharding is None:
        found[name] = jax.numpy.asarray(next(iter(values.values())))
    else:
        found[name] = jax.make_array_from_callback(shape, sharding, lambda index: values[_bounds(index, shape)])


def first_damage(folder: epath.Path, what: str) -> None:
    """Reads every chunk of a tree, and keeps none. Raises DamagedError, ConfigError and OSError as reading does."""
    for name, store in open_arrays(folder, what, cache=False).items():
        # Along the first axis: the largest tensors are stacks of layers.
        rows = (store.chunk_layout.read_chunk.shape or (1,))[0] or 1
        for start in range(0, store.shape[0], rows) if store.rank else [None]:
            part = store if start is None else store[start : min(start + rows, store.shape[0])]
            read_result(part.read(), folder, what, name)


def read_result(future: ts.Future, folder: epath.Path, what: str, name: str) -> Any:
    """Waits for what was asked of tensor `name` of a tree. Raises DamagedError, and OSError where storage refuses."""
    try:
        return future.result()
    except (ValueError, NotImplementedError, OSError) as error:
        text = str(error)
        if text.startswith(_REFUSED):
            raise OSError(f"{what}: tensor {name} cannot be read: {_reason(error)}") from error
        where = _damaged_file(folder, text)
        raise DamagedError(f"{what}: tensor {name} in {where} is missing or changed ({_reason(error)})") from error


def _damaged_file(folder: epath.Path, message: str) -> str:
    """Finds the file that TensorStore complains of: it names it, or else the key, which the database's index knows."""
    quoted = re.findall(r'"([^"]+)"', message.partition(" [tensorstore_spec")[0])
    inside = [text for text in quoted if text.startswith(f"{folder}/") and not text.endswith("/")]
    key = re.search(r'Error reading "([^"]+)" in OCDBT', message)
    if inside or key is None:
        return inside[0] if inside else str(folder)
    try:
        base, context = ts.KvStore.open(_base(folder)).result(), ts.Context()
        versions = ts.ocdbt.dump(base, context=context).result()["versions"]
        nodes = [("", versions[-1]["root"]["location"])]
        while nodes:
            prefix, location = nodes.pop()
            for entry in ts.ocdbt.dump(base, location, context=context).result()["entries"]:
                if "location" in entry:
                    nodes.append((prefix + bytes(entry["subtree_common_prefix"]).decode(), entry["location"]))
                elif prefix + bytes(entry["key"]).decode() == key[1]:
                    # `value:FOLDER/:FILE:OFFSET:LENGTH`, or the value itself where it is short.
                    inner, file = str(entry["indirect_value"]).split(":")[1:3]
                    return str(folder / f"{inner}{file}")
    except (ValueError, KeyError, OSError):
        pass
    return str(folder)


def _reason(error: Exception) -> str:
    """Returns the first line of an error, without the description of the whole store that TensorStore adds."""
    return str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
