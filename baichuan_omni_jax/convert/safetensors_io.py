"""Safetensors files: read lazily, a tensor or a block of its rows at a time; written as the data comes.

Files are read with pread, never mapped: a mapped 15 GB checkpoint would count as the process' memory. bf16 stays bf16.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from baichuan_omni_jax.errors import ConfigError, list_some
from baichuan_omni_jax.storage import describe_stand_in, refuse_stand_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's dtypes of quantized checkpoints: at most 8 bits, which mean nothing without their scales.
_QUANTIZED = frozenset("F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0 F6_E2M3 F6_E3M2 F4".split())
# The format's own limit of a header.
_HEADER_BYTES = 100 << 20
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that was not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Returns how many bytes the tensor takes."""
        return prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors somewhere: what a conversion reads. `location` names the source in errors."""

    @property
    def location(self) -> str: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or the rows of its first axis from `rows.start` to `rows.stop`."""
        ...


class SafetensorsFile:
    """One file. The header is read and checked at once, tensors by `read`. Raises ConfigError."""

    def __init__(self, path: Path):
        self.path, self.location = Path(path), str(path)
        refuse_stand_in(self.path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - open as long as the object is
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        # Everything that the file says of itself is checked before any of its bytes are believed.
        header, self._start = self._header()
        self._offsets: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, value in header.items():
            if name != "__metadata__":
                self.infos[name], self._offsets[name] = self._info(name, value)
        self._check_layout()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some rows of it. Raises ConfigError naming file and tensor when the file gives out."""
        info = self.infos[name]
        start, shape = self._offsets[name], info.shape
        if rows is not None:
            # Rows lie one after the other, so some of them are one stretch of bytes.
            start += rows.start * info.nbytes // max(shape[0], 1)
            shape = (rows.stop - rows.start, *shape[1:])
        out = np.empty(shape, info.dtype)
        bytes_ = out.reshape(-1).view(np.uint8)
        done = 0
        while done < bytes_.size:
            # One call of the kernel moves at most 2 GiB.
            got = os.preadv(self._file.fileno(), [bytes_[done : done + (1 << 30)].data], self._start + start + done)
            if not got:
                raise ConfigError(f"{self.path} ends inside tensor {name}")
            done += got
        return out

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _header(self) -> tuple[dict, int]:
        # 8 bytes of length, then JSON: {"name": {"dtype", "shape", "data_offsets": [start, end]}}, then the data.
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        if self._size < 8 or length > min(_HEADER_BYTES, self._size - 8):
            raise ConfigError(f"{self.path} is truncated or no safetensors file: its header does not fit in it")
        try:
            header = json.loads(os.pread(self._file.fileno(), length, 8))
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ConfigError(f"{self.path} is corrupt: its header is not JSON ({error})") from error
        return header, 8 + length

    def _info(self, name: str, value: Any) -> tuple[TensorInfo, int]:
        self._check_dtype(name, value)
        try:
            dtype, shape, (start, end) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
            info = TensorInfo(shape, dtype)
            fits = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and end - start == info.nbytes
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.path} is corrupt: the entry of tensor {name} cannot be used: {value}") from error
        if not fits:
            raise ConfigError(
                f"{self.path} is corrupt: tensor {name} of shape {list(shape)} does not take {end - start} bytes"
            )
        if self._start + end > self._size:
            missing = self._start + end - self._size
            raise ConfigError(f"{self.path} is truncated: tensor {name} ends {missing} bytes past the file's end")
        return info, start

    def _check_dtype(self, name: str, value: object) -> None:
        """Raises ConfigError for a tensor of a quantized checkpoint."""
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if isinstance(dtype, str) and dtype in _QUANTIZED:
            raise ConfigError(
                f"{self.path}: tensor {name} has dtype {dtype}, of a quantized checkpoint: "
                "give the weights as they were before (BF16, F16 or F32)"
            )

    def _check_layout(self) -> None:
        """Raises ConfigError unless tensors lie side by side and fill the file, as the format demands."""
        end = 0
        # Empty tensors start where another does: the shorter first.
        for name in sorted(self.infos, key=lambda name: (self._offsets[name], self.infos[name].nbytes)):
            if self._offsets[name] != end:
                raise ConfigError(
                    f"{self.path} is corrupt: tensor {name} starts at byte {self._offsets[name]}, not {end}"
                )
            end += self.infos[name].nbytes
        if self._start + end != self._size:
            raise ConfigError(f"{self.path} is corrupt: {self._size - self._start - end} bytes belong to no tensor")


class ShardedSafetensors:
    """The files of a `model.safetensors.index.json` as one. Raises ConfigError for what index and files disagree on."""

    def __init__(self, index: Path):
        self.location, folder = str(index), Path(index).parent
        files = self._weight_map(index)
        shards = sorted(set(files.values()))
        # Shards that were never fetched are named before any is opened, each with a tensor that lies in it.
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            first = {shard: next(name for name, file in files.items() if file == shard) for shard in absent}
            lost = [f"{folder / shard} (with {name})" for shard, name in first.items()]
            raise ConfigError(f"{index} names shards that are not there: {list_some(lost, ', ')}")
        for shard in shards:
            if found := describe_stand_in(folder / shard):
                name = next(name for name, file in files.items() if file == shard)
                raise ConfigError(f"{folder / shard} (with tensor {name}) is {found}")
        self._shards = {shard: SafetensorsFile(folder / shard) for shard in shards}
        # Index and headers must name the same tensors in the same files.
        problems = [
            f"{folder / file} lacks tensor {name}"
            for name, file in files.items()
            if name not in self._shards[file].infos
        ]
        for shard, file in self._shards.items():
            problems += [f"{folder / shard} holds tensor {name}" for name in file.infos if files.get(name) != shard]
        if problems:
            raise ConfigError(f"{index} and its shards disagree: {list_some(problems)}")
        self._files = files
        self.infos = {name: self._shards[file].infos[name] for name, file in files.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some rows of it. See `SafetensorsFile.read`."""
        return self._shards[self._files[name]].read(name, rows)

    def close(self) -> None:
        """Closes all shards."""
        for shard in self._shards.values():
            shard.close()

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        refuse_stand_in(index)
        try:
            values = json.loads(index.read_text(encoding="utf-8"))
            files = values.get("weight_map") if isinstance(values, dict) else None
            # Bare file names alone: an index must not lead out of its folder.
            if (
                not isinstance(files, dict)
                or not files
                or not all(isinstance(file, str) and Path(file).name == file for file in files.values())
            ):
                raise ValueError("weight_map must map tensors to file names")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{index} cannot be used as an index: {error}") from error
        return files


def open_weights(folder: Path) -> SafetensorsFile | ShardedSafetensors:
    """Opens a Hugging Face folder's weights: `model.safetensors` or the shards of its index. Raises ConfigError."""
    folder = Path(folder)
    # Also where the name is that of a folder, or of a link to what is gone: opening it says so.
    for name, opened in ((SINGLE, SafetensorsFile), (INDEX, ShardedSafetensors)):
        if os.path.lexists(folder / name):
            return opened(folder / name)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    also = f", but {pickled[0]}: convert it to safetensors first" if pickled else ""
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}{also}")


def blocks_of(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Cuts the rows of the first axis into blocks of at most `BLOCK_BYTES`; a row is never cut."""
    count = max(1, BLOCK_BYTES // max(1, prod(shape[1:]) * itemsize))
    return (slice(start, min(start + count, shape[0])) for start in range(0, shape[0], count))


class SafetensorsWriter:
    """Writes one file tensor by tensor, in the order of `order(infos)`. Its header is known before any data is."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._left = self.order(infos)
        self._infos = infos
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self._left:
            info, start = infos[name], end
            end += info.nbytes
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Spaces up to a multiple of 8, as the reference writer does: the data begins aligned.
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)

    @staticmethod
    def order(infos: Mapping[str, TensorInfo]) -> list[str]:
        """Sorts by falling item size, so that every tensor is aligned, then by name, as the reference writer does."""
        return sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Writes the next tensor, given as blocks of rows or whole."""
        assert name == self._left.pop(0), name
        written = 0
        for block in blocks:
            block = np.ascontiguousarray(block)
            self._file.write(block.reshape(-1).view(np.uint8).data)
            written += block.nbytes
        assert written == self._infos[name].nbytes, (name, written)

    def close(self) -> None:
        """Closes the file, every tensor of which has been written."""
        assert not self._left, self._left
        self._file.close()


def write_shards(
    folder: Path,
    name: str,
    infos: Mapping[str, TensorInfo],
    shard_bytes: int,
    blocks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes tensors as one file, or where it would be too large as shards and an index.

    Args:
        folder: where the files are written.
        name: the file's name, `model.safetensors`; shards are `model-00001-of-00002.safetensors`, ….
        infos: the tensors' shapes and dtypes.
        shard_bytes: how large a file may be.
        blocks: called once a tensor; gives its values, whole or by blocks of rows.
    """
    shards = plan_shards(infos, shard_bytes)
    stem = name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [name]
    for file, shard in zip(names, shards, strict=True):
        writer = SafetensorsWriter(folder / file, shard)
        for tensor in writer.order(shard):
            writer.write(tensor, blocks(tensor))
        writer.close()
    if len(shards) > 1:
        files = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2))


def plan_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """Cuts tensors, in the given order, into shards of at most `shard_bytes` (a larger tensor has one to itself)."""
    # Greedily in the model's order, so that layers stay together, as in released checkpoints.
    shards: list[dict[str, TensorInfo]] = [{}]
    room = shard_bytes
    for name, info in infos.items():
        if shards[-1] and info.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = info
        room -= info.nbytes
    return shards
