"""baichuan-omni convert: what it prints, and one sentence and nothing left behind for whatever cannot be used."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import tiny, to_hf
from baichuan_omni_jax.config.vocoder import tiny_vocoder, vocoder_to_json
from baichuan_omni_jax.convert.safetensors_io import SafetensorsFile, TensorInfo, open_weights, write_shards
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint
from baichuan_omni_jax.convert.to_jax import convert_to_jax

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def command():
    """`baichuan-omni convert` with these arguments -> exit code."""

    def run(*arguments: object) -> int:
        return main(["convert", *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "hf"
    write_random_checkpoint(folder, tiny(), shards=2, vocoder=tiny_vocoder())
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage, alone in a folder of its own."""
    return Path(shutil.copytree(checkpoint, tmp_path / "hf"))


def test_there_and_back(command, checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours, back = Path("new 100%/ours"), Path("back")
    vocoder = checkpoint / "vocoder.safetensors"
    assert command("to-jax", "--from", checkpoint, "--vocoder", vocoder, "--to", ours) == 0
    output = capsys.readouterr()
    assert "llm: 27 tensors" in output.out
    assert f"wrote {ours}" in output.out
    assert "MiB" in output.err
    assert command("to-torch", "--from", ours, "--to", back, "--shard-mb", 2) == 0
    there, again = open_weights(checkpoint), open_weights(back)
    assert there.infos == again.infos
    assert all(there.read(name).tobytes() == again.read(name).tobytes() for name in there.infos)
    assert (back / "vocoder.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "new 100%"]


def test_dry_run_prints_every_row(command, checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert command("to-jax", "--from", checkpoint, "--to", tmp_path / "ours", "--dry-run") == 0
    output = capsys.readouterr().out
    row = "model.layers.{layer}.self_attn.W_pack.weight (x3) <-> llm.layers.attention.q_proj.weight, "
    assert row in output
    assert "stacked by layer: (n h) d -> d n h" in output
    assert "audio_tokenizer.audio_model.positional_embedding is computed" in output
    convert_to_jax(checkpoint, tmp_path / "ours")
    assert command("to-torch", "--from", tmp_path / "ours", "--to", tmp_path / "back", "--dry-run") == 0
    output = capsys.readouterr().out
    assert row in output
    assert "not there, so not written: vocoder" in output
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def set_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123\n")


DAMAGES = {
    "pointer of a shard": (
        lambda folder: set_pointer(folder / "model-00002-of-00002.safetensors"),
        ["model-00002-of-00002.safetensors (with tensor ", "is a pointer of Git LFS (to 123 bytes)"],
    ),
    "pointer of the tokenizer": (
        lambda folder: set_pointer(folder / "tokenizer.json"),
        ["tokenizer.json is a pointer of Git LFS"],
    ),
    "quantized": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "gptq"}),
        ["config.json: quantization_config (gptq) is not supported"],
    ),
    "no such folder": (shutil.rmtree, ["hf/config.json cannot be read"]),
    "no weights": (lambda folder: [p.unlink() for p in folder.glob("model*")], ["holds neither model.safetensors"]),
    "truncated": (lambda folder: cut(folder / "model-00002-of-00002.safetensors"), ["00002-of-00002", "is truncated"]),
    "missing shard": (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), ["shards that are not"]),
    "alibi": (
        lambda folder: set_config(folder, position_embedding_type="alibi"),
        ["position_embedding_type = 'alibi'"],
    ),
    "sparse heads": (lambda folder: set_config(folder, sparse_attention_heads=[1]), ["sparse_attention_heads = [1]"]),
    "one layer fewer": (
        lambda folder: set_config(folder, num_hidden_layers=2),
        [
            "8 problems",
            "model.layers.2.mlp.up_proj.weight has no place",
            "model.layers.2.input_layernorm.weight has no",
        ],
    ),
    "other qkv": (
        lambda folder: set_config(folder, attention_qkv_pack=False),
        ["24 problems", "model.layers.0.self_attn.W_pack.weight has no rule", "; and 19 more"],
    ),
    "wider": (
        lambda folder: set_config(folder, intermediate_size=640),
        ["9 problems", "model.layers.1.mlp.down_proj.weight has shape [128, 320], the config wants [128, 640]"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_cannot_be_used(command, copy: Path, tmp_path: Path, capsys, damage: str) -> None:
    act, parts = DAMAGES[damage]
    act(copy)
    assert command("to-jax", "--from", copy, "--to", tmp_path / "deep" / "ours") == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    for part in (*parts, str(tmp_path)):
        assert part in output
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


def with_buffers(folder: Path, target: Path, buffers: dict[str, np.ndarray]) -> Path:
    """The checkpoint as one file, with buffers that the table does not know."""
    weights = open_weights(folder)
    values = {name: weights.read(name) for name in weights.infos} | buffers
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}
    target.mkdir()
    write_shards(target, "model.safetensors", infos, 1 << 30, lambda name: [values[name]])
    shutil.copyfile(folder / "config.json", target / "config.json")
    return target


def rotary(width: int, base: float) -> np.ndarray:
    """base^(-2i/width) for each pair of dimensions i (RoFormer, 3.2.2)."""
    return np.array([base ** (-2 * i / width) for i in range(width // 2)], np.float32)


def test_rotary_buffers_of_old_checkpoints_are_dropped(command, checkpoint: Path, tmp_path: Path, capsys) -> None:
    """tiny() has 3 layers of heads of 32; the vision tower turns half a head of 32 by rows, and half by columns."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    buffers = {name.format(layer): rotary(32, 1e6) for layer in range(3)}
    buffers["model.visual_model.rotary_pos_emb.inv_freq"] = rotary(16, 1e4)
    old = with_buffers(checkpoint, tmp_path / "old", buffers)
    assert command("to-jax", "--from", old, "--to", tmp_path / "ours", "--branches", "llm,vision") == 0
    assert f"dropped {name.format(0)} and 3 more: rotary positions are computed" in capsys.readouterr().out
    other = with_buffers(checkpoint, tmp_path / "other", {name.format(1): rotary(32, 1e4)})
    assert command("to-jax", "--from", other, "--to", tmp_path / "more", "--branches", "llm", "--dry-run") == 0
    assert f"{name.format(1)} does not hold the frequencies of config.json" in capsys.readouterr().out


@pytest.mark.slow
def test_vocoders_that_cannot_be_used(command, copy: Path, tmp_path: Path, capsys) -> None:
    def refused(name: str, *parts: str) -> None:
        assert command("to-jax", "--from", copy, "--vocoder", copy / name, "--to", tmp_path / "ours") == 2
        output = capsys.readouterr().err
        for part in (name if name != "vocoder.safetensors" else "vocoder", *parts):
            assert part in output
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    refused("absent.pt", "is not there")
    refused("config.json", "is neither .safetensors nor .pt")
    (copy / "bad.pt").write_bytes(b"not a pickle")
    refused("bad.pt", "cannot be loaded with weights_only=True" if has_torch() else "needs torch")
    sizes = copy / "vocoder_config.json"
    sizes.write_text(json.dumps(vocoder_to_json(replace(tiny_vocoder(), base_channels=64))))
    refused("vocoder.safetensors", "tensor conv_pre.weight_v has shape [32, 20, 7], the config wants [64, 20, 7]")
    sizes.write_text(json.dumps(vocoder_to_json(replace(tiny_vocoder(), in_channels=40))))
    refused("vocoder.safetensors", "reads 40 mels (in_channels), the model makes 20")
    sizes.write_text("{}")
    refused("vocoder.safetensors", "vocoder_config.json", "is missing")


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


@pytest.mark.slow
def test_a_torch_file(command, copy: Path, tmp_path: Path, capsys) -> None:
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch")
    file = SafetensorsFile(copy / "vocoder.safetensors")
    tensors = {n: torch.from_numpy(file.read(n).view(np.int16)).view(torch.bfloat16) for n in file.infos}
    torch.save(tensors, copy / "hift.pt")
    assert command("to-jax", "--from", copy, "--vocoder", copy / "hift.pt", "--to", tmp_path / "ours") == 0
    assert command("to-torch", "--from", tmp_path / "ours", "--to", tmp_path / "back") == 0
    back = SafetensorsFile(tmp_path / "back" / "vocoder.safetensors")
    assert back.infos == file.infos
    assert all(back.read(name).tobytes() == file.read(name).tobytes() for name in file.infos)
    capsys.readouterr()
    torch.save({"state": tensors}, copy / "nested.pt")
    torch.save(Opaque(), copy / "code.pt")
    for name, part in (("nested.pt", "not a flat dict of tensors: state"), ("code.pt", "weights_only=True")):
        assert command("to-jax", "--from", copy, "--vocoder", copy / name, "--to", tmp_path / "more") == 2
        output = capsys.readouterr().err
        assert part in output
        assert output.count("\n") == 1


class Opaque:
    """An object that only running a file's code could load."""


@pytest.mark.slow
def test_targets_and_arguments(command, checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    for arguments, part in (
        (("to-jax", "--from", checkpoint, "--to", tmp_path / "full"), "full already exists and is not empty"),
        (("to-jax", "--from", checkpoint, "--to", tmp_path / "file"), "file already exists"),
        (("to-jax", "--from", checkpoint, "--to", tmp_path / "file" / "x"), "file"),
        (("to-torch", "--from", checkpoint, "--to", tmp_path / "full"), "full already exists"),
        (("to-torch", "--from", checkpoint, "--to", tmp_path / "n"), "is neither a checkpoint (branches.json) nor"),
        (("to-torch", "--from", "brain=x", "--to", tmp_path / "n"), "names branch 'brain'"),
        (("to-torch", "--from", tmp_path, "--to", tmp_path / "n", "--shard-mb", "0"), "--shard-mb must be at least 1"),
        (("to-jax", "--from", checkpoint, "--branches", "llm,brain", "--to", tmp_path / "n"), "names 'brain'"),
        (("to-jax", "--from", checkpoint), "--to"),
        (("to-jam",), "invalid choice: 'to-jam'"),
        ((), "to-jax | to-torch"),
    ):
        assert command(*arguments) == 2, arguments
        output = capsys.readouterr().err
        assert part in output
        assert output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_conversion_that_breaks_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_jax(checkpoint, tmp_path / "deep" / "er" / "ours", advance=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(command, checkpoint: Path, tmp_path: Path, capsys) -> None:
    ours = tmp_path / "ours"
    convert_to_jax(checkpoint, ours)
    largest = max((ours / "params" / "llm" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert command("to-torch", "--from", ours, "--to", tmp_path / "back") == 2
    assert f" in {largest} is missing or changed (" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert to_hf(tiny()) == json.loads((ours / "config.json").read_text())
