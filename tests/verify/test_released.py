"""baichuan-omni verify --hf against a stand-in of the released code: its tensor names around transformers' Qwen2."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import tiny, to_hf
from baichuan_omni_jax.convert import convert_to_jax, plan_to_jax

WHY = "comparing with PyTorch code needs torch and transformers: pip install -e '.[test,parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
safetensors = pytest.importorskip("safetensors.numpy")

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "verify_parity.py"
AUTO = {
    "AutoConfig": "configuration_omni.OmniConfig",
    "AutoModelForCausalLM": "modeling_omni.OmniForCausalLM",
}
CONFIGURATION = """
from transformers import Qwen2Config


class OmniConfig(Qwen2Config):
    model_type = "omni"
"""
MODELING = """
from torch import nn
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .configuration_omni import OmniConfig


class PackedAttention(Qwen2Attention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.sizes = [self._modules.pop(name).out_features for name in ("q_proj", "k_proj", "v_proj")]
        self.W_pack = nn.Linear(config.hidden_size, sum(self.sizes))

    q_proj = property(lambda self: lambda x: self.W_pack(x).split(self.sizes, -1)[0])
    k_proj = property(lambda self: lambda x: self.W_pack(x).split(self.sizes, -1)[1])
    v_proj = property(lambda self: lambda x: self.W_pack(x).split(self.sizes, -1)[2])


class OmniForCausalLM(Qwen2ForCausalLM):
    config_class = OmniConfig

    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = PackedAttention(config, i)
        self.post_init()
"""
CFG = tiny()
CFG = replace(CFG, llm=replace(CFG.llm, num_layers=2, vocab_size=320))


@pytest.fixture(scope="module")
def command():
    return lambda *arguments: main(["verify", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def _modules_cache(tmp_path_factory):
    """transformers copies remote code to a folder of its own: not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A Hugging Face folder with code, and fp32 weights of the language model only."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(to_hf(CFG) | {"auto_map": AUTO}))
    (folder / "configuration_omni.py").write_text(CONFIGURATION)
    (folder / "modeling_omni.py").write_text(MODELING)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    generator = np.random.default_rng(0)
    write_weights(folder, {name: noise(generator, x.shape) for name, x in model.state_dict().items()})
    return folder


@pytest.fixture(scope="module")
def checkpoint(released, tmp_path_factory) -> Path:
    return converted(released, tmp_path_factory.mktemp("ours") / "omni")


def noise(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norm scales and biases away from 1 and 0, so that none may be left out."""
    spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
    return (generator.normal(0, spread, shape) + (len(shape) == 1)).astype(np.float32)


def write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def converted(source: Path, target: Path) -> Path:
    convert_to_jax(source, target, jobs=plan_to_jax(source, branches=["llm"]))
    return target


def test_a_converted_checkpoint_passes(command, released, checkpoint, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert command("--hf", released, "--checkpoint", checkpoint, "--json", report) == 0
    assert "2 comparisons, 0 failed" in capsys.readouterr().out
    output = json.loads(report.read_text())
    assert output["hf"] == str(released)
    assert [row["tensor"] for row in output["rows"]] == ["logits_0", "logits_1"]
    assert all(0 < row["relative_error"] < row["tolerance"] for row in output["rows"])


def test_a_wrong_weight_fails(command, released, tmp_path):
    damaged = tmp_path / "hf"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((released / "config.json").read_bytes())
    weights = safetensors.load_file(released / "model.safetensors")
    weights["model.layers.1.self_attn.W_pack.weight"][-1, 0] += 0.1
    write_weights(damaged, weights)
    wrong = converted(damaged, tmp_path / "omni")
    assert command("--hf", released, "--checkpoint", wrong) == 1


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_missing_package_is_named(command, released, checkpoint, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert command("--hf", released, "--checkpoint", checkpoint) == 2
    assert "pip install 'baichuan_omni_jax[parity]'" in sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to compare"),
        (("--hf", "{hf}"), "go together"),
        (("--checkpoint", "{ours}"), "go together"),
        (("--hf", "{hf}", "--checkpoint", "{ours}", "--fixtures", "{hf}"), "give one of them"),
        (("--hf", "{hf}", "--checkpoint", "{ours}", "--only", "rvq"), "--only chooses"),
        (("--hf", "{hf}", "--checkpoint", "nowhere"), "nowhere/config.json cannot be read"),
        (("--hf", "{hf}", "--checkpoint", "{hf}"), "is neither a checkpoint"),
        (("--hf", "no/where", "--checkpoint", "{ours}"), "--hf no/where is not a Hugging Face folder"),
    ],
)
def test_wrong_arguments(command, released, checkpoint, capsys, arguments, message):
    assert command(*(text.format(hf=released, ours=checkpoint) for text in arguments)) == 2
    assert message in sentence(capsys)


def test_code_that_fails_is_named(command, released, checkpoint, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((released / "config.json").read_bytes())
    (tmp_path / "configuration_omni.py").write_text("raise RuntimeError('written for another version')\n")
    assert command("--hf", tmp_path, "--checkpoint", checkpoint) == 2
    assert f"the code of {tmp_path} fails: RuntimeError: written for another version" in sentence(capsys)


def sentence(capsys) -> str:
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert output.startswith("error: ")
    return output
