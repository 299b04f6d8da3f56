"""Small random folders of Qwen2, Qwen2-VL and Whisper: by hand, and by transformers where it is installed.

Both have random values in every tensor, norms and biases too: what is equal may not be exchanged unseen.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from data_pipelines.tokenizers.tokenizer import SPECIAL_TOKENS, byte_level

# Of a table of 400 rows the tokenizer takes 303: 256 bytes, 44 merges and three added tokens, as Qwen2's own.
ROWS, OWN_TOKENS = 400, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLM = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
TOWER = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4, "hidden_size": 64}
WHISPER = {
    "num_mel_bins": 20,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 100,
}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 50}
WHY = "comparing with PyTorch code needs torch and transformers: pip install -e '.[test,parity]'"

TEXT = "The lake is calm, and so are we: 湖面很平静。 Where the river meets the sea, boats wait for the evening wind."

Shapes = dict[str, tuple[int, ...]]


def qwen2_tensors(sizes: dict[str, Any], tied: bool) -> Shapes:
    """Every tensor of a Qwen2ForCausalLM, by transformers' names."""
    d, f, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    kv = sizes["num_key_value_heads"] * head
    layer = {
        **{f"self_attn.{name}_proj.weight": (out, d) for name, out in (("q", d), ("k", kv), ("v", kv), ("o", d))},
        **{f"self_attn.{name}_proj.bias": (out,) for name, out in (("q", d), ("k", kv), ("v", kv))},
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    tensors = {f"model.layers.{i}.{n}": s for i in range(sizes["num_hidden_layers"]) for n, s in layer.items()}
    table = (sizes["vocab_size"], d)
    return (
        tensors
        | {"model.embed_tokens.weight": table, "model.norm.weight": (d,)}
        | ({} if tied else {"lm_head.weight": table})
    )


def tower_tensors(sizes: dict[str, Any], home: str = "visual.") -> Shapes:
    """Every tensor of Qwen2-VL's tower and merger."""
    d, f = sizes["embed_dim"], sizes["embed_dim"] * sizes["mlp_ratio"]
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    layer = {f"{name}.weight": shape for name, shape in linears.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    layer |= {f"{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    tensors = {f"blocks.{i}.{n}": s for i in range(sizes["depth"]) for n, s in layer.items()}
    tensors |= {"patch_embed.proj.weight": (d, 3, 2, 14, 14), "merger.ln_q.weight": (d,), "merger.ln_q.bias": (d,)}
    for name, shape in {"merger.mlp.0": (4 * d, 4 * d), "merger.mlp.2": (sizes["hidden_size"], 4 * d)}.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {home + name: shape for name, shape in tensors.items()}


def encoder_tensors(sizes: dict[str, Any], home: str = "model.encoder.") -> Shapes:
    """Every tensor of Whisper's encoder but the position table."""
    d, f, mels = sizes["d_model"], sizes["encoder_ffn_dim"], sizes["num_mel_bins"]
    linears = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")} | {"fc1": (f, d), "fc2": (d, f)}
    layer = {f"{name}.weight": shape for name, shape in linears.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in linears.items() if name != "self_attn.k_proj"}
    norms = ("self_attn_layer_norm", "final_layer_norm")
    layer |= {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}
    tensors = {f"layers.{i}.{n}": s for i in range(sizes["encoder_layers"]) for n, s in layer.items()}
    tensors |= {"conv1.weight": (d, mels, 3), "conv2.weight": (d, d, 3), "conv1.bias": (d,), "conv2.bias": (d,)}
    tensors |= {"layer_norm.weight": (d,), "layer_norm.bias": (d,)}
    return {home + name: shape for name, shape in tensors.items()}


def random_values(shapes: Shapes, seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Normal values, spread by the tensor's width; those of norms around 1."""
    rng = np.random.default_rng(seed)
    spreads = {name: (shape[-1] if len(shape) > 1 else 16) ** -0.5 for name, shape in shapes.items()}
    means = {name: float("norm" in name and name.endswith("weight")) for name in shapes}
    return {n: (means[n] + spreads[n] * rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}


def whisper_positions(length: int, width: int) -> np.ndarray:
    """Sines, then cosines, as Whisper has them, computed in double precision."""
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def own_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 303 tokens that knows no token of ours but the end of text."""
    tokenizer = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in OWN_TOKENS])
    return tokenizer


def new_rows() -> range:
    """The rows that tokens of ours take: those that the tokenizer does not know, behind its own."""
    known = own_tokenizer().get_vocab_size()
    return range(known, known + len(set(SPECIAL_TOKENS) - set(OWN_TOKENS)))


def write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_qwen2(folder: Path, *, tied: bool = False, dtype: str = "float32", **changes: Any) -> Path:
    sizes = LLM | {key: value for key, value in changes.items() if key in LLM}
    config = {"model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1e6, "tie_word_embeddings": tied, **sizes}
    write_folder(folder, random_values(qwen2_tensors(sizes, tied), 1, dtype), config | changes)
    own_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_qwen2_vl(folder: Path, *, home: str = "visual.", dtype: str = "float32", **changes: Any) -> Path:
    sizes = TOWER | {key: value for key, value in changes.items() if key in TOWER}
    tensors = random_values(tower_tensors(sizes, home), 2, dtype)
    if home:
        # A little of its language model, which nobody asked for.
        tensors["model.embed_tokens.weight"] = np.zeros((3, 4), np.float32)
    config = {"model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl", "in_chans": 3, **sizes}}
    return write_folder(folder, tensors, config | {k: v for k, v in changes.items() if k not in TOWER})


def write_whisper(folder: Path, *, home: str = "model.encoder.", dtype: str = "float32", **changes: Any) -> Path:
    sizes = WHISPER | {key: value for key, value in changes.items() if key in WHISPER}
    tensors = random_values(encoder_tensors(sizes, home), 3, dtype)
    positions = whisper_positions(sizes["max_source_positions"], sizes["d_model"])
    tensors |= {f"{home}embed_positions.weight": positions.astype(dtype)}
    if home:
        tensors["model.decoder.embed_tokens.weight"] = np.zeros((3, 4), np.float32)
    return write_folder(folder, tensors, {"model_type": "whisper", **sizes, **changes})


def transformers_models() -> dict[str, Callable[..., Any]]:
    """The same three as models of transformers, random in every tensor: `save_pretrained` writes the folder."""
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)

    def filled(model: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "embed_positions" not in name:
                    width = value.shape[-1] if value.ndim > 1 else 16
                    noise = torch.randn(value.shape, generator=generator) * width**-0.5
                    value.copy_(noise + float("norm" in name and name.endswith("weight")))
        return model.eval()

    def qwen2(tied: bool) -> Any:
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return filled(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLM, **ids, tie_word_embeddings=tied)))

    def qwen2_vl() -> Any:
        text = LLM | {"bos_token_id": None, "eos_token_id": None}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        config = transformers.Qwen2VLConfig(vision_config=TOWER, text_config=text)
        return filled(transformers.Qwen2VLForConditionalGeneration(config))

    def whisper() -> Any:
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        ids |= {"begin_suppress_tokens": None}
        return filled(
            transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER, **DECODER, **ids))
        )

    return {"qwen2": qwen2, "qwen2_vl": qwen2_vl, "whisper": whisper}
