"""Safetensors files written as the data comes, one tensor or block of rows at a time, and cut into shards."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from baichuan_omni_jax.convert.safetensors_io import DTYPES, TensorInfo

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)

    @staticmethod
    def order(infos: Mapping[str, TensorInfo]) -> list[str]:
        """By falling item size, so that every tensor is aligned, then by name: what the reference writer does."""
        return sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """The next tensor, as blocks of rows or whole."""
        assert name == self._left.pop(0), name
        written = 0
        for block in blocks:
            block = np.ascontiguousarray(block)
            self._file.write(block.reshape(-1).view(np.uint8))
            written += block.nbytes
        assert written == self._infos[name].nbytes, (name, written)

    def close(self) -> None:
        assert not self._left, self._left
        self._file.close()


def write_shards(
    folder: Path,
    name: str,
    infos: Mapping[str, TensorInfo],
    shard_bytes: int,
    blocks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes the tensors `infos` as the file `name`, or where it would exceed `shard_bytes` as shards and an index.

    `blocks(tensor)` gives a tensor's values, whole or by rows; each is asked for once.
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
    """Tensors in the given order, cut into shards of at most `shard_bytes` (a larger tensor has one to itself)."""
    shards: list[dict[str, TensorInfo]] = [{}]
    room = shard_bytes
    for name, info in infos.items():
        if shards[-1] and info.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = info
        room -= info.nbytes
    return shards
