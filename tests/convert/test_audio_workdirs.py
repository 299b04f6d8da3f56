"""What audio training starts from, Whisper's encoder, and what it leaves, in the released names and back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from baichuan_omni_jax.checkpoint import abstract_branches, load_branches, save_branches
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.config.parts import WHISPER_SIZES
from baichuan_omni_jax.convert import branch_rules, load_branch_from_safetensors, open_weights
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint
from baichuan_omni_jax.convert.tables import AUDIO_ENCODER
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.omni.audio_tokenizer_model import AudioTokenizerModel
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel
from tests.helpers.micro import one_device

MODELS = {"audio_tokenizer": AudioTokenizerModel, "flow_matching": FlowMatchingModel}


@pytest.fixture(scope="module")
def command():
    """`baichuan-omni convert` with these arguments -> exit code."""

    def run(*arguments: object) -> int:
        return main(["convert", *map(str, arguments)])

    return run


@pytest.mark.parametrize("task", ["audio_tokenizer", pytest.param("flow_matching", marks=pytest.mark.slow)])
def test_there_and_back_to_the_byte(command, task, tmp_path, capsys):
    """A checkpoint as the task saves it, in fp32: every tensor comes back but those that only training has."""
    rng, omni = np.random.default_rng(0), tiny()
    with jax.set_mesh(one_device()):
        model = jax.eval_shape(lambda: MODELS[task](jax.random.key(0), omni, ComputePolicy()))
        shapes = named_values(model)
        values = {name: rng.standard_normal(shape.shape).astype(np.float32) for name, shape in shapes.items()}
        model = with_values(model, values)
        save_branches(tmp_path / "run", {name: getattr(model, name) for name in model.branches}, omni)
    assert command("to-torch", "--from", tmp_path / "run", "--to", tmp_path / "hf") == 0
    output = capsys.readouterr().out
    left_out = "left out, the released model has no place for it: transcript_adapter"
    assert (left_out in output) == (task == "audio_tokenizer")
    tensors = open_weights(tmp_path / "hf")
    codebook = [name for name in tensors.infos if ".vq_list.3.codebook." in name]
    assert sorted(name.rsplit(".", 1)[1] for name in codebook) == ["cluster_size", "embed", "embed_avg"]
    branches = [name for name in model.branches if name != "transcript_adapter"]
    back = tmp_path / "back"
    assert command("to-jax", "--from", tmp_path / "hf", "--branches", ",".join(branches), "--to", back) == 0
    found = named_values(load_branches(str(back), abstract_branches(omni, only=branches)))
    assert found.keys() == {name for name in values if not name.startswith("transcript_adapter.")}
    assert all(np.asarray(value).tobytes() == values[name].tobytes() for name, value in found.items())


def write_whisper(folder: Path, home: str = "model.encoder", **sizes: int) -> Path:
    """The encoder of a random tiny model as a Whisper checkpoint; `folder`/released is that model."""
    write_random_checkpoint(folder / "released", tiny())
    released = open_weights(folder / "released")
    names = {name: name.replace(AUDIO_ENCODER, home) for name in released.infos if name.startswith(f"{AUDIO_ENCODER}.")}
    tensors = {theirs: released.read(name).astype(np.float16) for name, theirs in names.items()}
    tensors[f"{home}.embed_positions.weight"] = tensors.pop(f"{home}.positional_embedding")
    save_file(tensors | {"proj_out.weight": np.zeros((2, 2), np.float16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "whisper"} | {name: getattr(tiny().audio, name) for name in WHISPER_SIZES} | sizes)
    )
    return folder


@pytest.mark.slow
def test_ears_from_whisper(command, tmp_path, capsys):
    """Its encoder as the released model's table reads it, beside a bridge and codebooks of the right shapes."""
    whisper, made = write_whisper(tmp_path / "whisper"), tmp_path / "tokenizer"
    made_by = ("from-whisper", "--from", whisper, "--model", "tiny", "--to", made)
    assert command(*made_by) == 0
    abstract = abstract_branches(tiny(), only=["audio_encoder"])
    found = named_values(load_branches(str(made), abstract)["audio_encoder"])
    released = open_weights(whisper / "released")
    rules = branch_rules(tiny())["audio_encoder"]
    wanted = named_values(load_branch_from_safetensors(released, rules, abstract["audio_encoder"]))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        as_half = np.asarray(value).astype(np.float16).astype(np.float32)
        assert np.array_equal(found[name], as_half) == name.startswith("encoder."), name
    assert command(*made_by) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_whisper_that_does_not_fit_is_refused(command, tmp_path, capsys):
    for place, home, sizes, sentence in (
        ("a", "model.encoder", {"num_mel_bins": 80}, "num_mel_bins is 80, the model's audio.num_mel_bins 32"),
        ("b", "model.decoder", {}, "holds no Whisper encoder: there is no tensor model.encoder.conv1.weight"),
    ):
        whisper = write_whisper(tmp_path / place, home, **sizes)
        assert command("from-whisper", "--from", whisper, "--model", "tiny", "--to", tmp_path / "tokenizer") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "tokenizer").exists()
