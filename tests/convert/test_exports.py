"""Exported folders load where the docs say: the language model alone as Qwen2, and what config.json says of either."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import OmniConfig, tiny, to_hf
from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.convert.files import missing_code
from baichuan_omni_jax.convert.safetensors_io import open_weights
from baichuan_omni_jax.convert.to_parts import convert_to_part, plan_to_part
from baichuan_omni_jax.convert.to_torch import convert_to_torch, open_source, plan_to_torch
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.verify.run import _our_logits
from data_pipelines.tokenizers.tokenizer import train_tokenizer

LLM = LLMConfig(
    vocab_size=400,
    hidden_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=112,
    rope_theta=5e5,
)
COMPUTE = ComputePolicy(attention_block=32, remat="none")
# transformers.models.qwen2: every tensor of a layer, and its shape from the sizes above.
LAYER = {
    "self_attn.q_proj.weight": (96, 96),
    "self_attn.q_proj.bias": (96,),
    "self_attn.k_proj.weight": (32, 96),
    "self_attn.k_proj.bias": (32,),
    "self_attn.v_proj.weight": (32, 96),
    "self_attn.v_proj.bias": (32,),
    "self_attn.o_proj.weight": (96, 96),
    "mlp.gate_proj.weight": (112, 96),
    "mlp.up_proj.weight": (112, 96),
    "mlp.down_proj.weight": (96, 112),
    "input_layernorm.weight": (96,),
    "post_attention_layernorm.weight": (96,),
}
TENSORS = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()}
TENSORS |= {"model.embed_tokens.weight": (400, 96), "lm_head.weight": (400, 96), "model.norm.weight": (96,)}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "float32",
    "vocab_size": 400,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "use_cache": True,
    "max_position_embeddings": 65536,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def with_llm(llm: LLMConfig) -> OmniConfig:
    base = tiny()
    vision = replace(base.vision, out_dim=llm.hidden_size)
    head = replace(base.audio_head, head_dim=llm.hidden_size)
    return replace(base, llm=llm, vision=vision, audio_head=head, tokens=replace(base.tokens, end_of_text=0))


def make_llm(llm: LLMConfig) -> LanguageModel:
    """Random values in every tensor, norms and biases too: what is equal may not be exchanged unseen."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), llm, COMPUTE))
    return jax.tree.map(lambda x: rng.normal(0.02 if len(x.shape) > 2 else 0.5, 0.1, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The lake is calm, and so are we: 湖面很平静。"] * 20, 380)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "norm head"])
def run(request, tmp_path_factory, tokenizer) -> tuple[Path, OmniConfig]:
    """A checkpoint of the branch `llm`, fp32, as a run saves it."""
    folder = tmp_path_factory.mktemp("export") / "run"
    cfg = with_llm(replace(LLM, use_norm_head=request.param))
    save_branches(folder, {"llm": make_llm(cfg.llm)}, cfg, tokenizer.to_str())
    return folder, cfg


@pytest.fixture
def qwen2(run, tmp_path) -> Path:
    convert_to_part(open_source(str(run[0])), tmp_path / "qwen2", "qwen2")
    return tmp_path / "qwen2"


def test_names_shapes_and_sizes_are_those_of_qwen2(qwen2):
    weights = open_weights(qwen2)
    assert {name: info.shape for name, info in weights.infos.items()} == TENSORS
    assert {info.dtype.name for info in weights.infos.values()} == {"float32"}
    assert json.loads((qwen2 / "config.json").read_text()) == CONFIG
    assert json.loads((qwen2 / "generation_config.json").read_text()) == {"eos_token_id": 0}


def test_parts_of_a_tensor_that_were_saved_apart_are_joined_unrounded(tmp_path):
    """Where a stage trains the queries alone, keys and values of a bf16 checkpoint stay bf16 beside them."""
    cfg = with_llm(LLM)
    model = make_llm(cfg.llm)
    attention = model.layers.attention
    for name in ("k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.weight[...] = linear.weight[...].astype("bfloat16")
        linear.bias[...] = linear.bias[...].astype("bfloat16")
    save_branches(tmp_path / "run", {"llm": model}, cfg)
    convert_to_torch(open_source(str(tmp_path / "run")), tmp_path / "omni")
    weights = open_weights(tmp_path / "omni")
    packed = weights.read("model.layers.0.self_attn.W_pack.bias")
    assert packed.dtype == np.float32
    parts = (getattr(attention, f"{name}_proj").bias[...][0] for name in "qkv")
    expected = np.concatenate([np.asarray(part, np.float32).reshape(-1) for part in parts])
    np.testing.assert_array_equal(packed, expected)


def test_values_are_those_of_the_released_layout(run, qwen2, tmp_path):
    """W_pack of the folder of the whole model holds Q, K and V one below the other."""
    folder, cfg = run
    convert_to_torch(open_source(str(folder)), tmp_path / "omni")
    omni, alone = open_weights(tmp_path / "omni"), open_weights(qwen2)
    for kind in ("weight", "bias"):
        parts = [alone.read(f"model.layers.1.self_attn.{which}_proj.{kind}") for which in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts), omni.read(f"model.layers.1.self_attn.W_pack.{kind}"))
    head = omni.read("lm_head.weight")
    if cfg.llm.use_norm_head:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    np.testing.assert_allclose(alone.read("lm_head.weight"), head, rtol=1e-6)


def test_the_tokenizer_comes_with_the_form_of_a_conversation(qwen2, tokenizer):
    assert (qwen2 / "tokenizer.json").read_text() == tokenizer.to_str()
    values = json.loads((qwen2 / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    output = jinja2.Template(values["chat_template"]).render(messages=messages, add_generation_prompt=True)
    assert output == "<B_SYS>Be kind.<C_Q>Why?<C_A>"


def test_no_language_model_no_export(run, tmp_path):
    source = open_source(str(run[0]))
    with pytest.raises(ConfigError, match="has no branch llm: there is no language model to export"):
        plan_to_part(replace(source, readers={}), "qwen2")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype"), ()])
def test_config_says_the_dtype_that_tensors_have(run, tmp_path, dtype, keys):
    """A run saves fp32, and its config.json says bfloat16."""
    folder, cfg = run
    source = open_source(str(folder))
    home = tmp_path / "home"
    home.mkdir()
    values = {key: value for key, value in to_hf(cfg).items() if key != "torch_dtype"}
    (home / "config.json").write_text(json.dumps(values | dict.fromkeys(keys, "bfloat16")))
    source = replace(source, home=home)
    exports, done = plan_to_torch(source, dtype), []
    convert_to_torch(source, tmp_path / "hf", exports=exports, advance=done.append)
    assert sum(done) == sum(export.nbytes for export in exports.values())
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    stored = {info.dtype.name for info in open_weights(tmp_path / "hf").infos.values()}
    assert stored == {dtype or "float32"}
    assert found == values | dict.fromkeys(keys or ("torch_dtype",), dtype or "float32")


def test_missing_code_is_named(tmp_path):
    """What config.json names, and what that imports from beside it."""
    code = {"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M", "AutoProcessor": "other/repo--processing.P"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": code}))
    assert missing_code(tmp_path) == ["configuration_x.py", "modeling_x.py"]
    (tmp_path / "modeling_x.py").write_text("import os\nfrom .vision_x import A, B\nfrom .configuration_x import C\n")
    assert missing_code(tmp_path) == ["configuration_x.py", "vision_x.py"]
    for name in ("configuration_x", "vision_x"):
        (tmp_path / f"{name}.py").write_text("")
    assert missing_code(tmp_path) == []
    (tmp_path / "config.json").write_text("{}")
    assert missing_code(tmp_path) == []


def test_transformers_computes_the_same_logits(run, qwen2, tokenizer):
    """Loaded without any word of sizes or code, fp32, against our own model: 1e-5 of the largest logit."""
    why = "comparing with PyTorch code needs torch and transformers: pip install -e '.[test,parity]'"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(qwen2)).eval()
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    assert theirs.dtype == torch.float32
    ids = np.random.default_rng(1).integers(0, LLM.vocab_size, (2, 60)).astype(np.int32)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(ids).long()).logits.numpy()
    mask = np.ones_like(ids)
    ours = _our_logits(run[1], run[0], ids, mask)
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()
    read = transformers.AutoTokenizer.from_pretrained(str(qwen2))
    text = "<B_SYS>Hi<C_Q>The lake, 湖面 is 12 calm!<C_A>"
    assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False).ids
    output = read.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert output == "<C_Q>Why?<C_A>"
