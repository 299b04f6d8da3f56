"""What sound training leaves, in the released names and back: codebooks with their running means, the adapter."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from micro import one_device

from baichuan_omni_jax.checkpoint import load_branches, save_branches
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.convert import abstract_branches, open_weights
from baichuan_omni_jax.nn.param import Compute, named_values, with_values
from baichuan_omni_jax.omni.tokenizer_model import TokenizerModel
from baichuan_omni_jax.omni.voice_model import VoiceModel

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "convert_weights.py"
MODELS = {"audio_tokenizer": TokenizerModel, "flow_matching": VoiceModel}


@pytest.fixture(scope="module")
def command():
    """The script's `main` with these arguments -> exit code."""
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: object) -> int:
        before, sys.argv = sys.argv, ["convert_weights.py", *map(str, arguments)]
        try:
            return script.main()
        finally:
            sys.argv = before

    return run


@pytest.mark.parametrize("task", ["audio_tokenizer", pytest.param("flow_matching", marks=pytest.mark.slow)])
def test_there_and_back_to_the_byte(command, task, tmp_path, capsys):
    """A checkpoint as the task saves it, in fp32: every tensor comes back but those that only training has."""
    rng, omni = np.random.default_rng(0), tiny()
    with jax.set_mesh(one_device()):
        model = jax.eval_shape(lambda: MODELS[task](jax.random.key(0), omni, Compute()))
        shapes = named_values(model)
        values = {name: rng.standard_normal(shape.shape).astype(np.float32) for name, shape in shapes.items()}
        model = with_values(model, values)
        save_branches(tmp_path / "run", {name: getattr(model, name) for name in model.branches}, omni)
    assert command("to-torch", "--from", tmp_path / "run", "--to", tmp_path / "hf") == 0
    told = capsys.readouterr().out
    left_out = "left out, the released model has no place for it: transcript_adapter"
    assert (left_out in told) == (task == "audio_tokenizer")
    tensors = open_weights(tmp_path / "hf")
    codebook = [name for name in tensors.infos if ".vq_list.3.codebook." in name]
    assert sorted(name.rsplit(".", 1)[1] for name in codebook) == ["cluster_size", "embed", "embed_avg"]
    branches = [name for name in model.branches if name != "transcript_adapter"]
    back = tmp_path / "back"
    assert command("to-jax", "--from", tmp_path / "hf", "--branches", ",".join(branches), "--to", back) == 0
    found = named_values(load_branches(str(back), abstract_branches(omni, only=branches)))
    assert found.keys() == {name for name in values if not name.startswith("transcript_adapter.")}
    assert all(np.asarray(value).tobytes() == values[name].tobytes() for name, value in found.items())
