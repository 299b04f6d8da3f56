"""Safetensors read and written as the reference library does, and every damaged file refused by name."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from baichuan_omni_jax.convert import safetensors_io
from baichuan_omni_jax.convert.safetensors_io import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorInfo,
    blocks_of,
    open_weights,
    write_shards,
)
from baichuan_omni_jax.errors import ConfigError

VALUES = {
    "b.weight": np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16),
    "a": np.array(3.5, np.float32),
    "c": np.arange(10, dtype=np.float16).reshape(5, 2),
    "empty": np.zeros((0, 3), np.float32),
}
INFOS = {name: TensorInfo(value.shape, value.dtype) for name, value in VALUES.items()}


def write(folder: Path, shard_bytes: int = 1 << 20) -> None:
    folder.mkdir(exist_ok=True)
    write_shards(folder, "model.safetensors", INFOS, shard_bytes, lambda name: [VALUES[name]])


def equal(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "flax") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(VALUES)
        assert all(equal(np.asarray(file.get_tensor(name)), value) for name, value in VALUES.items())


def test_we_read_what_the_reference_library_writes(tmp_path: Path, monkeypatch) -> None:
    save_file(VALUES, tmp_path / "model.safetensors", {"any": "thing"})
    file = open_weights(tmp_path)
    assert file.infos == INFOS
    assert all(equal(file.read(name), value) for name, value in VALUES.items())
    assert equal(file.read("b.weight", slice(1, 3)), VALUES["b.weight"][1:3])
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", 30)
    assert [rows for rows in blocks_of((4, 6), 2)] == [slice(0, 2), slice(2, 4)]
    assert [rows for rows in blocks_of((2, 60), 2)] == [slice(0, 1), slice(1, 2)]


def test_shards_have_a_size_and_an_index(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 4 + 20}
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    weights = open_weights(tmp_path)
    assert weights.infos == INFOS
    assert all(equal(weights.read(name), value) for name, value in VALUES.items())


def test_a_writer_asks_for_every_tensor_whole(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((2, 2), np.dtype(np.float32))})
    with pytest.raises(AssertionError):
        writer.write("a", [np.zeros((1, 2), np.float32)])


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "cut":
        content = content[:-7]
    elif how == "longer":
        content += b"xx"
    elif how == "short header":
        content = content[: length // 2]
    elif how == "not json":
        content[8] = ord("?")
    else:
        if how == "shape":
            header["b.weight"]["shape"] = [4, 7]
        elif how == "dtype":
            header["b.weight"]["dtype"] = "F3"
        elif how == "gap":
            header["b.weight"]["data_offsets"] = [n + 8 for n in header["b.weight"]["data_offsets"]]
            content += b"x" * 8
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"model.safetensors is truncated: tensor \S+ ends 7 bytes past the file's end"),
        ("longer", "model.safetensors is corrupt: 2 bytes belong to no tensor"),
        ("short header", "model.safetensors is truncated or no safetensors file"),
        ("not json", "model.safetensors is corrupt: its header is not JSON"),
        ("shape", r"model.safetensors is corrupt: tensor b.weight of shape \[4, 7\] does not take 48 bytes"),
        ("dtype", "model.safetensors is corrupt: the entry of tensor b.weight cannot be used"),
        ("gap", "model.safetensors is corrupt: tensor b.weight starts at byte"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, how: str, message: str) -> None:
    write(tmp_path)
    damage(tmp_path / "model.safetensors", how)
    with pytest.raises(ConfigError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_quantized_weights_are_called_so(tmp_path: Path, dtype: str) -> None:
    """A header of the format: a dtype of 8 bits or fewer, a shape, and the place of the bytes."""
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match=rf"model\.safetensors: tensor a\.weight has dtype {dtype}, of a quantized"):
        open_weights(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 4976698672\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_a_pointer_instead_of_weights(tmp_path: Path, name: str) -> None:
    write(tmp_path, shard_bytes=1 << 20 if name == "model.safetensors" else 60)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ConfigError) as error:
        open_weights(tmp_path)
    output = str(error.value)
    assert output.startswith(str(tmp_path / name))
    assert "is a pointer of Git LFS (to 4,976,698,672 bytes), not the file itself" in output
    if "00002" in name:
        assert "(with tensor c)" in output


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds neither .*, but pytorch_model-00001-of-00002\.bin: convert it"):
        open_weights(tmp_path)


def test_a_file_that_gives_out_later(tmp_path: Path) -> None:
    write(tmp_path)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    last = max(file.infos, key=lambda name: file._offsets[name])
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-3])
    with pytest.raises(ConfigError, match=f"model.safetensors ends inside tensor {last}"):
        file.read(last)


def test_indexes_that_lie_are_refused(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=60)
    path = tmp_path / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    first, second = sorted(set(good["weight_map"].values()))

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_weights(tmp_path)

    path.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {"ghost": first, "spirit": second}}))
    refused(f"index.json and its shards disagree: .*{first} lacks tensor ghost; .*{second} lacks tensor spirit")
    path.write_text(json.dumps(good | {"weight_map": {n: f for n, f in good["weight_map"].items() if n != "c"}}))
    refused("holds tensor c")
    for text in ("{", "{}", '{"weight_map": {"a": "../elsewhere"}}', '{"weight_map": []}'):
        path.write_text(text)
        refused("index.json cannot be used as an index")
    path.write_text(json.dumps(good))
    (tmp_path / first).unlink()
    refused(f"names shards that are not there: .*{first} .with ")
    path.unlink()
    refused("holds neither model.safetensors nor model.safetensors.index.json")
